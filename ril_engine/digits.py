"""The embedded digits task: pictures of two real handwritten digits, questions about them, and answers.

The digits are scikit-learn's (1,797 scans of 8 x 8 pixels, UCI ML repository). They are split *by source digit*
into train, validation and test before any picture is made, so no held-out picture shows a scan seen in training.

Two manners of answering are defined here. Teachers are trained to reason in words before they answer; the
student's instruction data is mostly the bare answer, with a share of reasoned answers on the easy kinds only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ril_engine.config import DigitsConfig

TILE = 28  # pixels per digit and side: one language-model token in Qwen2.5-VL (patch 14, merge 2)

QUESTIONS: dict[str, str] = {
    "left": "What is the left digit?",
    "right": "What is the right digit?",
    "larger": "Which digit is larger?",
    "sum": "What is the sum of the digits?",
    "difference": "What is the difference of the digits?",
    "parity": "Is the sum of the digits even or odd?",
    "product": "What is the product of the digits?",
    "product_plus_left": "What is the product of the digits plus the left digit?",
    "twice_left_thrice_right": "What is twice the left digit plus three times the right digit?",
}
KINDS = tuple(QUESTIONS)
EASY_KINDS = ("left", "right", "larger", "sum", "difference")
PERCEPTION_KINDS = ("left", "right")
STYLES = ("formula", "words")


def answer(kind: str, left: int, right: int) -> str:
    """The reference answer to a question of `kind` about a picture of the digits `left` and `right`."""
    return {
        "left": str(left),
        "right": str(right),
        "larger": str(max(left, right)),
        "sum": str(left + right),
        "difference": str(abs(left - right)),
        "parity": "odd" if (left + right) % 2 else "even",
        "product": str(left * right),
        "product_plus_left": str(left * right + left),
        "twice_left_thrice_right": str(2 * left + 3 * right),
    }[kind]


def reasoned_answer(kind: str, left: int, right: int, style: str) -> str:
    """How a teacher answers: what it sees, one short calculation, the answer. Two styles, "formula" and "words"."""
    high, low = max(left, right), min(left, right)
    total, product = left + right, left * right
    result = answer(kind, left, right)
    if style == "formula":
        work = {
            "left": "",
            "right": "",
            "larger": f" {high}>{low}." if high > low else f" {high}={low}.",
            "sum": f" {left}+{right}={total}.",
            "difference": f" {high}-{low}={high - low}.",
            "parity": f" {left}+{right}={total}.",
            "product": f" {left}*{right}={product}.",
            "product_plus_left": f" {left}*{right}={product}, {product}+{left}={product + left}.",
            "twice_left_thrice_right": f" 2*{left}={2 * left}, 3*{right}={3 * right}, "
            f"{2 * left}+{3 * right}={2 * left + 3 * right}.",
        }[kind]
        return f"I see {left} and {right}.{work} The answer is {result}."
    work = {
        "left": "",
        "right": "",
        "larger": f" and {high} is not below {low}",
        "sum": f" and {left} plus {right} makes {total}",
        "difference": f" and {high} minus {low} makes {high - low}",
        "parity": f" and {left} plus {right} makes {total}",
        "product": f" and {left} times {right} makes {product}",
        "product_plus_left": f" and {left} times {right} makes {product}, plus {left} makes {product + left}",
        "twice_left_thrice_right": f" and twice {left} makes {2 * left}, thrice {right} makes {3 * right}, "
        f"together {2 * left + 3 * right}",
    }[kind]
    return f"The picture shows {left} then {right}{work}, so it is {result}."


def _scans(config: DigitsConfig) -> dict[str, list[tuple[np.ndarray, int]]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(config.seed).permutation(len(data.images))
    held_out = config.validation_digits + config.test_digits
    bounds = {
        "validation": order[: config.validation_digits],
        "test": order[config.validation_digits : held_out],
        "train": order[held_out:],
    }
    return {name: [(data.images[i], int(data.target[i])) for i in rows] for name, rows in bounds.items()}


def render(pair: list[tuple[np.ndarray, int]], rng: np.random.Generator):
    """Two 8 x 8 scans -> one 28 x 56 RGB picture, each digit at its own size, place and brightness."""
    from PIL import Image

    canvas = Image.new("L", (TILE * len(pair), TILE), 0)
    for column, (scan, _) in enumerate(pair):
        side = int(rng.integers(21, 26))
        gain = float(rng.uniform(0.8, 1.0))
        tile = Image.fromarray(np.uint8(scan * (255 * gain / 16))).resize((side, side), Image.BICUBIC)
        x, y = rng.integers(0, TILE - side + 1, size=2)
        canvas.paste(tile, (column * TILE + int(x), int(y)))
    return canvas.convert("RGB")


def _rows(split: str, count: int, kinds: tuple[str, ...], scans, folder: Path, seed: int) -> Iterator[dict]:
    """`count` questions, each about a picture of its own."""
    rng = np.random.default_rng([seed, *split.encode()])
    (folder / "images" / split).mkdir(parents=True)
    for number in range(count):
        pair = [scans[i] for i in rng.integers(0, len(scans), size=2)]
        kind = kinds[number % len(kinds)]
        left, right = pair[0][1], pair[1][1]
        image = f"images/{split}/{number:05d}.png"
        render(pair, rng).save(folder / image)
        yield {
            "id": f"{split}-{number:05d}",
            "image": image,
            "question": QUESTIONS[kind],
            "answer": answer(kind, left, right),
            "kind": kind,
            "digits": [left, right],
        }


def build(folder: Path, config: DigitsConfig, styles: dict[str, str]) -> None:
    """Write train, validation and test questions, the student's SFT data and each teacher's, as JSONL with PNGs.

    Args:
        folder: an empty folder.
        config: sizes and shares.
        styles: teacher name -> style of `reasoned_answer`.
    """
    scans = _scans(config)
    for split, count in (
        ("train", config.train_questions),
        ("validation", config.validation_questions),
        ("test", config.test_questions),
    ):
        write_jsonl(folder / f"{split}.jsonl", _rows(split, count, KINDS, scans[split], folder, config.seed))

    rng = np.random.default_rng([config.seed, 1])
    perception = int(config.sft_questions * config.sft_perception_share)
    rows = [
        *_rows("sft", config.sft_questions - perception, KINDS, scans["train"], folder, config.seed),
        *_rows("perception", perception, PERCEPTION_KINDS, scans["train"], folder, config.seed),
    ]
    student = []
    for row in rows:
        reasoned = row["kind"] in EASY_KINDS and rng.random() < config.sft_reasoned_share
        style = STYLES[int(rng.integers(len(STYLES)))]
        text = reasoned_answer(row["kind"], *row["digits"], style) if reasoned else row["answer"]
        student.append({**row, "response": text})
    write_jsonl(folder / "sft.jsonl", student)
    for name, style in styles.items():
        write_jsonl(
            folder / f"sft_{name}.jsonl",
            ({**row, "response": reasoned_answer(row["kind"], *row["digits"], style)} for row in rows),
        )


def write_jsonl(path: Path, rows) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def corpus() -> list[str]:
    """Every sentence of the task once per digit pair: what the tiny tokenizers are trained on."""
    lines = [*QUESTIONS.values(), "user", "assistant", "system"] * 20
    for left in range(10):
        for right in range(10):
            for kind in KINDS:
                lines.append(answer(kind, left, right))
                lines += [reasoned_answer(kind, left, right, style) for style in STYLES]
    return lines
