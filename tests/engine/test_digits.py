"""The digits task: splits without leaks, right answers, tiny checkpoints that the Auto classes load."""

import json
import re

import pytest

from ril_engine import digits, tiny_models
from ril_engine.config import DigitsConfig
from ril_engine.errors import UserError

SMALL = DigitsConfig(train_questions=27, validation_questions=9, test_questions=9, sft_questions=100)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("left", "3"),
        ("right", "8"),
        ("larger", "8"),
        ("sum", "11"),
        ("smaller", "3"),
        ("product", "24"),
        ("product_chain", "3"),
        ("sum_chain", "2"),
        ("weighted_sum", "1"),
        ("left_chain", "4"),
        (digits.PERCEPTION, "3 8"),
    ],
)
def test_answers_by_hand(kind, expected):
    assert digits.answer(kind, 3, 8, 7, 5) == expected
    for style in digits.STYLES:
        assert digits.reasoned_answer(kind, 3, 8, 7, 5, style).rstrip(".").endswith(f"is {expected}")


def test_reasoned_answers_by_hand():
    case = ("sum_chain", 3, 8, 7, 5)
    assert digits.reasoned_answer(*case, "sentences") == "I see 3 and 8. 3+8=11, 1*7=7, 7+5=12. The answer is 2."
    clauses = "The picture shows 3 then 8, where 3+8=11, 1*7=7, 7+5=12, so it is 2."
    assert digits.reasoned_answer(*case, "clauses") == clauses
    assert digits._calculations("weighted_sum", 3, 8, 7, 5) == [(7, "*", 3, 21), (5, "*", 8, 40), (1, "+", 0, 1)]


def test_no_scan_is_shared_between_splits():
    scans = digits._scans(DigitsConfig())
    count = {name: len(rows) for name, rows in scans.items()}
    assert count == {"validation": 200, "test": 400, "train": 1197}
    seen = [
        id(image.base) if image.base is None else image.__array_interface__["data"][0]
        for rows in scans.values()
        for image, _ in rows
    ]
    assert len(set(seen)) == 1797


def test_build_writes_questions_and_pictures(tmp_path):
    from PIL import Image

    digits.build(tmp_path, SMALL)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows[:10]] == list(digits.KINDS) and len(rows) == 27
    for row in rows:
        assert row["answer"] == digits.answer(row["kind"], *row["digits"], *row["numbers"])
        with Image.open(tmp_path / row["image"]) as image:
            assert (image.format, image.size) == ("PNG", (56, 28))
            assert image.getextrema()[0][1] > 150  # a digit is drawn
    student = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert len(student) == 100 and sum(row["kind"] == digits.PERCEPTION for row in student) == 20
    for row in student:
        if row["kind"] == digits.PERCEPTION:
            assert row["response"] == row["answer"] == "{} {}".format(*row["digits"])
    assert 0 < sum(row["response"] != row["answer"] for row in student) < 40
    taught = [json.loads(line) for line in (tmp_path / "sft_sentences.jsonl").read_text().splitlines()]
    assert [row["id"] for row in taught] == [row["id"] for row in student]
    for row in taught:
        for a, sign, b, c in re.findall(r"(\d)([+*])(\d)=(\d+)", row["response"]):
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) * int(b))
    again = tmp_path / "again"
    again.mkdir()
    digits.build(again, SMALL)
    for path in ("test.jsonl", "sft_clauses.jsonl", rows[0]["image"]):
        assert (again / path).read_bytes() == (tmp_path / path).read_bytes()


@pytest.mark.parametrize("name", [name for name, each in tiny_models.RECIPES.items() if each[0] != "qwen2"])
def test_tiny_checkpoint_is_an_ordinary_one(tmp_path, name):
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    tiny_models.build(tmp_path, f"tiny:{name}", ["Who wrote it?"], seed=0)
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the left digit?"}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = [
        processor(text=[text], images=[Image.new("RGB", (56, 28), shade)], return_tensors="pt")
        for shade in ("black", "white")
    ]
    black, white = (model(**each).logits for each in inputs)
    assert torch.isfinite(black).all() and not torch.allclose(black, white)  # it sees the picture
    for style in digits.STYLES:
        sentence = digits.reasoned_answer("weighted_sum", 7, 8, 9, 4, style)
        assert processor.tokenizer.decode(processor.tokenizer(sentence)["input_ids"]) == sentence


def test_tokenizers_differ(tmp_path):
    from transformers import AutoTokenizer

    ids = []
    for name in ("student", "internvl_teacher"):
        tiny_models.build(tmp_path / name, f"tiny:{name}", [], seed=0)
        ids.append(AutoTokenizer.from_pretrained(tmp_path / name)("7*8=56")["input_ids"])
    assert len(ids[0]) == 6 and len(ids[1]) == 5


def test_unknown_tiny_model():
    with pytest.raises(UserError, match="'tiny:x': no such tiny model; expected one of tiny:student"):
        tiny_models.recipe("tiny:x")
