"""Files of questions, JSON lines or Parquet, each row checked, with messages that name file and row.

A row has id, question, answer and what else its file holds. The paths of its pictures are in `image` (one) or `images`
(several), and its question says by <image> where they stand if they do not come first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from ril_engine.config import Config
from ril_engine.errors import UserError
from ril_engine.runlog import warn

LINE_BYTES = 2**20  # a longer line is no row of a text file
PLACEHOLDER = "<image>"
SPLITS = ("train", "validation", "test", "sft")
TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}  # OpenAI's names, and LLaVA's
ROLES = {"human": "user", "gpt": "assistant"}


def json_lines(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(line number, its object or why it has none) of each line that is not blank."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LINE_BYTES)
                yield number, f"longer than {LINE_BYTES} bytes"
            elif line.strip():
                yield number, _object(line)


def _object(line: bytes) -> dict | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are no UTF-8 and endless numbers
        return f"not JSON ({getattr(error, 'msg', error)})"
    return row if isinstance(row, dict) else f"not a JSON object but {type(row).__name__}"


def text_of(value: object) -> str | None:
    """A text, or a number as text; None for anything else and for blank text."""
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        value = json.dumps(value)
    if not isinstance(value, str) or not value.strip():
        return None
    return value.encode("utf-8", "replace").decode()  # half a surrogate pair is good JSON, but no tokenizer takes it


def parquet_rows(path: Path) -> Iterator[tuple[int, dict | str]]:
    """(row number, the row or what is wrong with it) of a Parquet file; columns of bytes are pictures or left out."""
    import pyarrow
    from pyarrow import parquet

    number, shown = 0, ("image", "images", *TURNS)
    with path.open("rb") as raw:
        try:
            file = parquet.ParquetFile(raw)
            read = [each.name for each in file.schema_arrow if each.name in shown or "binary" not in str(each.type)]
            for batch in file.iter_batches(batch_size=64, columns=read):
                for row in batch.to_pylist():
                    number += 1
                    text = json.dumps(row, default=lambda value: "" if isinstance(value, bytes) else str(value))
                    plain = {key: row[key] if key in shown else value for key, value in json.loads(text).items()}
                    yield number, f"longer than {LINE_BYTES} bytes" if len(text) > LINE_BYTES else plain
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"data {path}, after row {number}: not readable as Parquet ({reason})") from error


def data_files(folder: Path, name: str) -> list[Path]:
    """Where a split of a folder is: NAME.jsonl, or NAME.parquet, or the shards NAME-*.parquet; the first if none is."""
    lines, *tables = (folder / f"{name}.jsonl", folder / f"{name}.parquet", *sorted(folder.glob(f"{name}-*.parquet")))
    found = [path for path in tables if path.exists()]
    if found and lines.exists():
        raise UserError(f"data {folder}: {lines.name} and {found[0].name} are one split; remove one of them")
    return found or [lines]


def place(path: Path, number: int) -> str:
    return f"data {path}, {'row' if path.suffix == '.parquet' else 'line'} {number}"


def checked_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict | str]]:
    """(number, the row or what is wrong with it) of each row, with text in each of the `required` fields. A question
    is as this module's first lines say; a picture that a Parquet file holds is bytes in the place of a path."""
    for number, row in (parquet_rows if path.suffix == ".parquet" else json_lines)(path):
        wrong = row if isinstance(row, str) else None
        if wrong:
            wrong += "; expected one object per line"
        elif "question" in required:
            wrong = _plain(row, "response" if "response" in required else "answer")
        for field in () if wrong else required:
            row[field] = text_of(row.get(field))
            if row[field] is None:
                wrong = f"no {field!r}; every line needs {', '.join(required)}"
                break
        yield number, wrong or row


def _plain(row: dict, reference: str) -> str | None:
    """Bring a row with turns or pictures into the form of this module; returns what is wrong with it."""
    shown = row.pop("images", None) or row.get("image") or []
    shown = list(shown) if isinstance(shown, list) else [shown]
    for name in TURNS.keys() & row.keys():
        said, asked = {}, row.pop(name)
        for turn in asked if isinstance(asked, list) else [None]:
            role, content = (turn.get(key) for key in TURNS[name]) if isinstance(turn, dict) else (None, None)
            role = ROLES.get(role, role)
            if role not in ("user", "assistant") or role in said or "assistant" in said:
                got = f"{len(asked)} turns" if isinstance(asked, list) else type(asked).__name__
                return f"{name}: expected a turn of the user, then at most one of the assistant, got {got}"
            said[role] = _text_of_turn(content, shown if role == "user" else [])
            if said[role] is None:
                return f"{name}: the turn of the {role} is neither text nor a list of parts of type text or image"
        row["question"], row[reference] = said.get("user"), said.get("assistant")
    found = [each.get("bytes") or each.get("path") if isinstance(each, dict) else each for each in shown]
    if bad := [each for each in found if not isinstance(each, str | bytes) or not each]:
        return f"image is {bad[0]!r:.60}, expected a path inside the folder; mend it"
    text = row.get("question")
    marked = text.count(PLACEHOLDER) if isinstance(text, str) else 0
    if marked not in (0, len(found)):
        return f"{marked} times {PLACEHOLDER} for {len(found)} images; expected one for each image, or none at all"
    if marked and (leading := re.match(rf"(\s*{PLACEHOLDER}\s*){{{marked}}}", text)):
        row["question"] = text[leading.end() :]  # pictures come first without being said to
    if found:
        row["image"] = found[0]
    if found[1:]:
        row["images"] = found
        del row["image"]
    return None


def _text_of_turn(content: object, shown: list) -> str | None:
    """A turn's text, with <image> where a part is a picture; pictures that parts bring are added to `shown`."""
    if isinstance(content, str):
        return content
    pieces = []
    for part in content if isinstance(content, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            shown += [part["image"]] if part.get("image") else []
        elif kind != "text" or not isinstance(part.get("text"), str):
            return None
        pieces.append(PLACEHOLDER if kind == "image" else part["text"])
    return "".join(pieces)


def parts(row: dict) -> list[tuple[str, str]]:
    """("text", a text) and ("image", a picture's path) of a question, in the order in which a model reads them."""
    names = row.get("images") or [name for name in [row.get("image")] if name]
    if not names or PLACEHOLDER not in row["question"]:
        return [*(("image", name) for name in names), ("text", row["question"])]
    first, *texts = (text.strip("\n") for text in row["question"].split(PLACEHOLDER))
    found = [("text", first)]
    for name, text in zip(names, texts, strict=True):
        found += [("image", name), ("text", text)]
    return [each for each in found if each[1]]


def pictures(row: dict) -> list[str]:
    return [value for kind, value in parts(row) if kind == "image"]


def read_jsonl(path: Path, required: tuple[str, ...]) -> list[dict]:
    """The rows of a JSONL file, with text in each of the `required` fields."""
    return [row for _, row in _numbered(path, required)]


def _numbered(path: Path, required: tuple[str, ...]) -> list[tuple[int, dict]]:
    found = []
    try:
        for number, row in checked_rows(path, required):
            if isinstance(row, str):
                raise UserError(f"{place(path, number)}: {row}")
            found.append((number, row))
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror}; data.dir must hold this file") from error
    if not found:
        raise UserError(f"data {path}: no rows; expected one JSON object per line")
    return found


def read_questions(path: Path, on_bad_data: str, *, referenced: bool, named: bool = True) -> list[dict]:
    """The questions of a split: id, question and answer as text, and whatever else a line holds.

    Args:
        on_bad_data: "stop" refuses a question without a reference answer, "skip" leaves it out with a warning.
        referenced: False takes questions without one; their answer is None.
        named: False gives a question without an id the number of its line.
    Raises:
        UserError: a malformed line, an id that comes twice, a question without a reference.
    """
    kept, bad, lines = [], [], {}
    for number, row in _numbered(path, ("id", "question") if named else ("question",)):
        row["id"] = text_of(row.get("id")) or str(number)
        if (first := lines.setdefault(row["id"], number)) != number:
            raise UserError(
                f"data {path}, lines {first} and {number}: both have the id {row['id']!r}; give each question its own"
            )
        row["answer"] = text_of(row.get("answer"))
        (bad if referenced and row["answer"] is None else kept).append(row)
    if not bad:
        return kept
    first, others = bad[0]["id"], f", nor for {len(bad) - 1} other questions" if bad[1:] else ""
    said = f"data {path}, line {lines[first]}: no 'answer' for question {first!r}{others}"
    if on_bad_data == "stop":
        raise UserError(f"{said}; give each question a reference, or set on_bad_data: skip to leave these out")
    if not kept:
        raise UserError(f"{said}, so that on_bad_data: skip leaves no question; give them references")
    warn(f"{said}; without a reference they are left out (on_bad_data: skip)")
    return kept


def image_path(folder: Path, name: str) -> Path:
    """A picture's file, which lies inside `folder`."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"image {name!r}: outside the dataset folder {folder}; give a path inside it")
    if not path.is_file():
        raise UserError(f"image {path}: no such file; its question names it")
    return path


def require_images(folder: Path, rows: list[dict]) -> None:
    """Before anything slow; whether they are pictures shows when they are read."""
    for row in rows:
        for name in pictures(row):
            image_path(folder, name)


def training_questions(config: Config, data_dir: Path) -> list[dict]:
    """The questions that get saved responses. Without answer rewards none needs a reference."""
    path, referenced = data_dir / "train.jsonl", bool(config.answer_rewards)
    rows = read_questions(path, config.on_bad_data, referenced=referenced)
    return rows[: config.responses.questions or None]


def evaluation_questions(config: Config, data_dir: Path) -> list[dict]:
    """The questions that accuracy is measured on before and after."""
    path = data_dir / f"{config.evaluation.split}.jsonl"
    rows = read_questions(path, config.on_bad_data, referenced=True)[: config.evaluation.questions or None]
    require_images(data_dir, rows)
    return rows


def validation_questions(config: Config, data_dir: Path) -> list[dict]:
    """The questions that accuracy is measured on during training; none where it is not."""
    if not config.rl.evaluate_every:
        return []
    rows = read_questions(data_dir / "validation.jsonl", config.on_bad_data, referenced=True)
    rows = rows[: config.rl.evaluate_questions]
    require_images(data_dir, rows)
    return rows
