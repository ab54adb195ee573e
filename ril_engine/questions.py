"""Files of questions: JSON lines, each checked, with messages that name file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from ril_engine.config import Config
from ril_engine.errors import UserError
from ril_engine.runlog import warn

LINE_BYTES = 2**20  # a longer line is no row of a text file


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


def read_jsonl(path: Path, required: tuple[str, ...]) -> list[dict]:
    """The rows of a JSONL file, with text in each of the `required` fields."""
    return [row for _, row in _numbered(path, required)]


def _numbered(path: Path, required: tuple[str, ...]) -> list[tuple[int, dict]]:
    try:
        found = list(json_lines(path))
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror}; data.dir must hold this file") from error
    if not found:
        raise UserError(f"data {path}: no rows; expected one JSON object per line")
    for number, row in found:
        if isinstance(row, str):
            raise UserError(f"data {path}, line {number}: {row}; expected one object per line")
        for field in required:
            row[field] = text_of(row.get(field))
            if row[field] is None:
                raise UserError(f"data {path}, line {number}: no {field!r}; every line needs {', '.join(required)}")
        if not isinstance(row.get("image"), str | None):
            raise UserError(
                f"data {path}, line {number}: image is {row['image']!r:.60}, expected a path inside the folder; mend it"
            )
    return found


def read_questions(path: Path, on_bad_data: str, *, referenced: bool) -> list[dict]:
    """The questions of a split: id, question and answer as text, and whatever else a line holds.

    Args:
        on_bad_data: "stop" refuses a question without a reference answer, "skip" leaves it out with a warning.
        referenced: False takes questions without one; their answer is None.
    Raises:
        UserError: a malformed line, an id that comes twice, a question without a reference.
    """
    kept, bad, lines = [], [], {}
    for number, row in _numbered(path, ("id", "question")):
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
        if row.get("image"):
            image_path(folder, row["image"])


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
