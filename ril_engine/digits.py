"""The embedded digits task: pictures of two real handwritten digits, questions about them, and answers.

The digits are scikit-learn's (1,797 scans of 8 x 8 pixels, UCI ML repository). They are split *by source digit*
into train, validation and test before any picture is made, so no held-out picture shows a scan seen in training.

Two manners of answering are defined here: the bare answer, and a rationale before it. Teachers are trained to give a
rationale always, the student in a share of its answers. Four kinds of question name two numbers and ask for the last
digit of a calculation: 6,400 combinations of which each kind has under a thousand in the instruction data, so that no
bare answer can be known by heart or guessed from a near one, while a rationale takes three plain sums or products of
one digit each. So the student sees and calculates well and answers those badly: what is left to learn is the teachers'
manner.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ril_engine.config import DigitsConfig

TILE = 28  # pixels per digit and side: one language-model token in Qwen2.5-VL (patch 14, merge 2)

QUESTIONS: dict[str, str] = {
    "left": "What is the left digit?",
    "right": "What is the right digit?",
    "larger": "Which digit is larger?",
    "smaller": "Which digit is smaller?",
    "sum": "What is the sum of the digits?",
    "product": "What is the product of the digits?",
    "product_chain": "What is the last digit of the product of the digits times {n} plus {m}?",
    "sum_chain": "What is the last digit of the sum of the digits times {n} plus {m}?",
    "weighted_sum": "What is the last digit of {n} times the left digit plus {m} times the right digit?",
    "left_chain": "What is the last digit of {n} times the left digit plus the right digit plus {m}?",
}
KINDS = tuple(QUESTIONS)
# SFT only: it asks for both digits in order, which teaches the student to tell left from right.
PERCEPTION = "perception"
PERCEPTION_QUESTION = "Which digits does the picture show?"
NUMBERS = range(2, 10)
STYLES = ("sentences", "clauses")

_OPERATIONS = {"+": operator.add, "*": operator.mul}


def _calculations(kind: str, left: int, right: int, n: int, m: int) -> list[tuple[int, str, int, int]]:
    """(a, sign, b, result) of each calculation in order. Only last digits matter in the long ones, so they go on."""

    def step(a: int, sign: str, b: int) -> tuple[int, str, int, int]:
        return a, sign, b, _OPERATIONS[sign](a, b)

    def chain(first: tuple, *rest: tuple[str, int]) -> list[tuple]:
        work = [first]
        for sign, b in rest:
            work.append(step(work[-1][3] % 10, sign, b))
        return work

    if kind == "sum":
        return [step(left, "+", right)]
    if kind == "product":
        return [step(left, "*", right)]
    if kind == "product_chain":
        return chain(step(left, "*", right), ("*", n), ("+", m))
    if kind == "sum_chain":
        return chain(step(left, "+", right), ("*", n), ("+", m))
    if kind == "left_chain":
        return chain(step(n, "*", left), ("+", right), ("+", m))
    if kind == "weighted_sum":
        one, two = step(n, "*", left), step(m, "*", right)
        return [one, two, step(one[3] % 10, "+", two[3] % 10)]
    return []


def answer(kind: str, left: int, right: int, n: int, m: int) -> str:
    """The reference answer to a question of `kind` with the numbers n and m about a picture of `left` and `right`."""
    if work := _calculations(kind, left, right, n, m):
        return str(work[-1][3] % 10 if len(work) > 1 else work[-1][3])
    return {
        PERCEPTION: f"{left} {right}",
        "left": str(left),
        "right": str(right),
        "larger": str(max(left, right)),
        "smaller": str(min(left, right)),
    }[kind]


def reasoned_answer(kind: str, left: int, right: int, n: int, m: int, style: str) -> str:
    """How a teacher answers: what it sees, the calculations, the answer. Two styles, "sentences" and "clauses"."""
    result, work = answer(kind, left, right, n, m), _calculations(kind, left, right, n, m)
    low, high, same = *sorted((left, right)), left == right
    # A rationale must pick the digit: from "I see 5 and 0. The answer is 0." students learn to pick the wrong one.
    shown = ", ".join(f"{a}{sign}{b}={c}" for a, sign, b, c in work) or {
        "left": f"left is {left}",
        "right": f"right is {right}",
        "larger": f"{high}{'=' if same else '>'}{low}",
        "smaller": f"{low}{'=' if same else '<'}{high}",
    }.get(kind, "")
    if style == "sentences":
        return f"I see {left} and {right}. {shown + '. ' if shown else ''}The answer is {result}."
    return f"The picture shows {left} then {right}{', where ' + shown if shown else ''}, so it is {result}."


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
        kind, (n, m) = kinds[number % len(kinds)], rng.choice(NUMBERS, size=2).tolist()
        left, right = pair[0][1], pair[1][1]
        image = f"images/{split}/{number:05d}.png"
        render(pair, rng).save(folder / image)
        yield {
            "id": f"{split}-{number:05d}",
            "image": image,
            "question": QUESTIONS.get(kind, PERCEPTION_QUESTION).format(n=n, m=m),
            "answer": answer(kind, left, right, n, m),
            "kind": kind,
            "digits": [left, right],
            "numbers": [n, m],
        }


def build(folder: Path, config: DigitsConfig) -> None:
    """Write train, validation and test questions, SFT data of the student and of each style, as JSONL with PNGs.

    Args:
        folder: an empty folder.
        config: sizes and shares.
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
        *_rows("perception", perception, (PERCEPTION,), scans["train"], folder, config.seed),
    ]
    student = []
    for row in rows:
        style = STYLES[int(rng.integers(len(STYLES)))]
        reasoned = row["kind"] != PERCEPTION and rng.random() < config.sft_reasoned_share
        text = reasoned_answer(row["kind"], *row["digits"], *row["numbers"], style) if reasoned else row["answer"]
        student.append({**row, "response": text})
    write_jsonl(folder / "sft.jsonl", student)
    for style in STYLES:
        write_jsonl(
            folder / f"sft_{style}.jsonl",
            ({**row, "response": reasoned_answer(row["kind"], *row["digits"], *row["numbers"], style)} for row in rows),
        )


def write_jsonl(path: Path, rows) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def corpus() -> list[str]:
    """Every sentence of the task once per digit pair: what the tiny tokenizers are trained on."""
    lines = ["user", "assistant", "system", PERCEPTION_QUESTION] * 20
    lines += [question.format(n=n, m=12 - n) for question in QUESTIONS.values() for n in NUMBERS] * 3
    for left in range(10):
        for right in range(10):
            for kind in KINDS:
                case = (kind, left, right, *(NUMBERS[(left + k * right) % len(NUMBERS)] for k in (1, 2)))
                lines += [answer(*case), *(reasoned_answer(*case, style) for style in STYLES)]
    return lines
