"""Data sets that users bring: every row checked, and Parquet made JSON lines with pictures in files beside them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from ril_engine import tiny_models
from ril_engine.config import Config, DataConfig
from ril_engine.errors import UserError
from ril_engine.models import Encoder, image_bytes, load, read_image
from ril_engine.questions import SPLITS, checked_rows, data_files, pictures, place, text_of


def unpack(splits: dict[str, list[Path]], out: Path, max_pixels: int) -> None:
    """Write SPLIT.jsonl for each split's files, their pictures as files in `out`/images.

    Raises:
        UserError: a row that is none, or a picture that cannot be read, by file and row.
    """
    (out / "images").mkdir()
    for split, files in splits.items():
        required = ("question", "response") if split == "sft" else ("question",)
        with open(out / f"{split}.jsonl", "w", encoding="utf-8") as written:
            for path in files:
                for number, row in checked_rows(path, required):
                    if isinstance(row, str):
                        raise UserError(f"{place(path, number)}: {row}")
                    try:
                        names = [_kept(path.parent, each, out, max_pixels) for each in pictures(row)]
                    except UserError as error:
                        raise UserError(f"{place(path, number)}: {error}") from error
                    if names:
                        row |= {"images": names} if "images" in row else {"image": names[0]}
                    written.write(json.dumps(row, ensure_ascii=False) + "\n")


def _kept(folder: Path, picture: str | bytes, out: Path, max_pixels: int) -> str:
    """A picture's file in `out`, named by its contents."""
    read_image(folder, picture, max_pixels)
    data = image_bytes(folder, picture)
    name = f"images/{hashlib.sha256(data).hexdigest()[:32]}"
    (out / name).write_bytes(data)
    return name


def check(path: Path, config: Config | None) -> dict:
    """Read a folder of data or a file of questions, tell of every bad row on stderr, and count what there is.

    Args:
        config: whose student counts tokens, and whose stages say what is needed; None: every reference is.
    Returns:
        {"data", "rows", "bad", "files": {name: rows, bad, kinds, with_reference, without_reference, images, and with a
        config prompt_tokens and reference_tokens}}
    """
    if path.is_dir():
        files = [each for name in SPLITS for each in data_files(path, name) if each.exists()]
        needed = ["train", config.evaluation.split] if config else []
        if config:
            needed += ["sft"] * bool(config.sft.steps) + ["validation"] * bool(config.rl.evaluate_every)
            needed = list(dict.fromkeys(needed))
        missing = [name for name in needed if not data_files(path, name)[0].exists()]
    else:
        files, missing = [path], []
    if not files or any(each.suffix not in (".jsonl", ".parquet") for each in files) or not files[0].exists():
        expected = "a folder with train.jsonl or train.parquet, or a .jsonl or .parquet file"
        raise UserError(f"data {path}: nothing to check there; expected {expected}")
    for name in missing:
        _tell(f"data {path}: no {name}.jsonl or {name}.parquet, which the config needs")
    encoder = _encoder(config, files[0].parent) if config else None
    found, ids = {}, {}
    for each in files:
        split = "sft" if each.stem.startswith("sft") else each.stem.split("-")[0]
        seen = ids.setdefault(split, {}) if path.is_dir() else None  # the shards of a split share their ids
        found[each.name] = _check_file(each, split, seen, encoder, config)
    rows, bad = (sum(each[name] for each in found.values()) for name in ("rows", "bad"))
    return {"data": str(path), "rows": rows, "bad": bad + len(missing), "files": found}


def _check_file(
    path: Path, split: str, seen: dict[str, str] | None, encoder: Encoder | None, config: Config | None
) -> dict:
    """`seen`: where the ids of this split have been; None where a question needs none."""
    reference = "response" if split == "sft" else "answer"
    required = (*(["id"] if seen is not None else []), "question", *(["response"] if split == "sft" else []))
    needs_answer = split != "sft" and (split != "train" or config is None or bool(config.answer_rewards))
    limit = (config.data if config else DataConfig()).max_image_pixels
    rows = bad = images = referenced = 0
    kinds, prompts, references = Counter(), [], []

    def tell(message: str) -> None:
        nonlocal bad
        bad += 1
        _tell(message)

    def check_row(number: int, row: dict | str) -> None:
        nonlocal images, referenced
        if isinstance(row, str):
            raise UserError(row)
        where = place(path, number)
        if seen is not None and (first := seen.setdefault(row["id"], where)) != where:
            raise UserError(f"has the id {row['id']!r} of {first}; give each question its own")
        text, shown = text_of(row.get(reference)), pictures(row)
        if text is None and needs_answer:
            raise UserError("no 'answer'; evaluation and answer_rewards need one")
        for each in shown:
            read_image(path.parent, each, limit)
        if encoder is not None:
            prompts.append(encoder.prompt({"id": number, **row})["input_ids"].shape[1])
            references.extend([len(encoder.response(text))] if text else [])
        images += len(shown)
        referenced += text is not None
        kinds[str(row.get("kind", "question"))] += 1

    try:
        for number, row in checked_rows(path, required):
            rows += 1
            try:
                check_row(number, row)
            except UserError as error:
                tell(f"{place(path, number)}: {error}")
    except UserError as error:  # the file ends here
        tell(str(error))
    if rows == 0 and not bad:
        tell(f"data {path}: no rows; expected one JSON object per line")
    counts = {"with_reference": referenced, "without_reference": sum(kinds.values()) - referenced, "images": images}
    lengths = {"prompt_tokens": _spread(prompts), "reference_tokens": _spread(references)} if encoder else {}
    return {"rows": rows, "bad": bad, "kinds": dict(kinds), **counts, **lengths}


def _spread(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]} if ordered else {}


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _encoder(config: Config, folder: Path) -> Encoder:
    """Of the student, whose weights nobody needs to count tokens."""
    with TemporaryDirectory() as built:
        student = config.student
        if student.path.startswith("tiny:"):
            instruction = [config.discriminator.instruction]
            tiny_models.build(Path(built), student.path, instruction, config.data.digits.seed)
            student = student.model_copy(update={"path": built})
        return Encoder(*load(student, weights=False), folder, config.data.max_image_pixels)
