"""Files of questions: what is read, what is refused and what is left out."""

import json

import pytest

from ril_engine.config import Config
from ril_engine.errors import UserError
from ril_engine.questions import (
    LINE_BYTES,
    evaluation_questions,
    json_lines,
    parts,
    read_jsonl,
    read_questions,
    training_questions,
)

GOOD = {"id": "a", "question": "What is it?", "answer": "7"}


@pytest.fixture
def file(tmp_path):
    def write(*rows: dict | str | bytes):
        lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
        lines = [line if isinstance(line, bytes) else line.encode() for line in lines]
        (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
        return tmp_path / "train.jsonl"

    return write


def answers(path, on_bad_data: str = "stop", *, referenced: bool = True) -> dict[str, str | None]:
    return {row["id"]: row["answer"] for row in read_questions(path, on_bad_data, referenced=referenced)}


def test_numbers_are_texts_and_blank_lines_are_none(file):
    path = file(GOOD, "", {**GOOD, "id": 12, "answer": -3}, " \r", {**GOOD, "id": "c", "answer": 0.5, "kind": "sum"})
    assert answers(path) == {"a": "7", "12": "-3", "c": "0.5"}
    assert read_questions(path, "stop", referenced=True)[2] == {**GOOD, "id": "c", "answer": "0.5", "kind": "sum"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 2: not JSON \(Expecting property name"),
        ("[1]", "line 2: not a JSON object but list; expected one object per line"),
        (b'{"id": "\xff"}', "line 2: not JSON .*can't decode byte 0xff"),
        ("[" * 100_000, r"line 2: not JSON \(maximum recursion depth"),
        ('{"id": ' + "9" * 5000 + "}", r"line 2: not JSON \(Exceeds the limit"),
        ({**GOOD, "more": "x" * LINE_BYTES}, f"line 2: longer than {LINE_BYTES} bytes"),
        ({**GOOD, "id": None}, "line 2: no 'id'; every line needs id, question"),
        ({**GOOD, "id": True}, "line 2: no 'id'"),
        ({**GOOD, "id": "b", "question": " "}, "line 2: no 'question'"),
        (GOOD, "lines 1 and 2: both have the id 'a'; give each question its own"),
    ],
)
def test_a_bad_line_is_named(file, row, message):
    for on_bad_data in ("stop", "skip"):
        with pytest.raises(UserError, match=r"data .*/train\.jsonl, " + message) as caught:
            answers(file(GOOD, row, {**GOOD, "id": "z"}), on_bad_data)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_lines_after_one_too_long_keep_their_numbers(file):
    path = file({"b": "x" * 3 * LINE_BYTES}, "", {"b": "y"}, "{")
    found = list(json_lines(path))
    assert [number for number, _ in found] == [1, 3, 4] and found[1][1] == {"b": "y"}


@pytest.mark.parametrize("answer", [None, "", " ", True, [], float("nan")])
def test_a_question_without_a_reference(file, answer, capsys):
    path = file(GOOD, {**GOOD, "id": "b", "answer": answer}, {"id": "c", "question": "?"}, {**GOOD, "id": "d"})
    said = r"data .*/train\.jsonl, line 2: no 'answer' for question 'b', nor for 1 other questions; "
    with pytest.raises(UserError, match=said + "give each question a reference, or set on_bad_data: skip to leave"):
        answers(path)
    assert not capsys.readouterr().err
    assert answers(path, "skip") == answers(path, "skip") == {"a": "7", "d": "7"}
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: data ") and "are left out (on_bad_data: skip)" in err
    assert answers(path, referenced=False) == {"a": "7", "b": None, "c": None, "d": "7"}
    with pytest.raises(UserError, match=r"so that on_bad_data: skip leaves no question; give them references"):
        answers(file({**GOOD, "answer": answer}), "skip")


def test_evaluation_always_needs_references(file, tmp_path):
    file({"id": "a", "question": "?"}, {**GOOD, "id": "b"})
    (tmp_path / "test.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    settings = {"teachers": [{"name": "t", "path": "p"}], "answer_rewards": []}
    assert [row["answer"] for row in training_questions(Config.model_validate(settings), tmp_path)] == [None, "7"]
    with pytest.raises(UserError, match=r"test\.jsonl, line 1: no 'answer' for question 'a'; give"):
        evaluation_questions(Config.model_validate(settings), tmp_path)
    settings |= {"on_bad_data": "skip", "responses": {"questions": 1}}
    assert [row["id"] for row in evaluation_questions(Config.model_validate(settings), tmp_path)] == ["b"]
    assert [row["id"] for row in training_questions(Config.model_validate(settings), tmp_path)] == ["a"]
    settings |= {"answer_rewards": [{"kind": "verifier"}]}  # the first of those that are left
    assert [row["id"] for row in training_questions(Config.model_validate(settings), tmp_path)] == ["b"]


def turns(*content, names=("messages", "role", "content"), roles=("user", "assistant"), **row) -> dict:
    return {
        "id": "a",
        names[0]: [dict(zip(names[1:], each, strict=True)) for each in zip(roles, content, strict=False)],
        **row,
    }


LLAVA = {"names": ("conversations", "from", "value"), "roles": ("human", "gpt")}
PARTS = [{"type": "image"}, {"type": "text", "text": "Which?"}, {"type": "text", "text": "B"}]
SAME = {"id": "a", "question": "Which?", "answer": "B"}


@pytest.mark.parametrize(
    ("row", "plain"),
    [
        (turns("Which?", "B"), SAME),
        (turns("<image>\nWhich?", "B", image="i.png", **LLAVA), {**SAME, "image": "i.png"}),
        (turns(PARTS[:2], "B", image="i.png"), {**SAME, "image": "i.png"}),
        (turns([{"type": "image", "image": "i.png"}, PARTS[1]], PARTS[2:]), {**SAME, "image": "i.png"}),
        ({**SAME, "images": ["i.png"]}, {**SAME, "image": "i.png"}),
        ({**SAME, "image": {"path": "i.png", "bytes": None}}, {**SAME, "image": "i.png"}),
        ({**SAME, "images": ["i", "j"]}, {**SAME, "images": ["i", "j"]}),
        ({**SAME, "question": "<image> <image>Which?", "image": ["i", "j"]}, {**SAME, "images": ["i", "j"]}),
    ],
)  # fmt: skip
def test_turns_and_pictures_become_plain_rows(file, row, plain):
    assert read_questions(file(row), "stop", referenced=True) == [plain]


def test_pictures_stand_where_the_question_says(file):
    row = {**GOOD, "question": "Is <image> left of\n<image>\nor not?", "images": ["i.png", "j.png"]}
    (read,) = read_questions(file(row), "stop", referenced=True)
    between = [("text", "Is "), ("image", "i.png"), ("text", " left of"), ("image", "j.png"), ("text", "or not?")]
    assert parts(read) == between
    (read,) = read_questions(file({**row, "question": "Which?"}), "stop", referenced=True)
    assert parts(read) == [("image", "i.png"), ("image", "j.png"), ("text", "Which?")]
    (read,) = read_questions(file({**GOOD, "question": "Which?\n<image>", "image": "i.png"}), "stop", referenced=True)
    assert parts(read) == [("text", "Which?"), ("image", "i.png")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "image": 3}, "image is 3, expected a path inside the folder; mend it"),
        ({**GOOD, "images": ["i.png", ""]}, "image is '', expected a path"),
        ({**GOOD, "question": "<image><image>?", "image": "i.png"}, "2 times <image> for 1 images; expected one for"),
        (turns("a", "b", "c", roles=("user", "assistant", "user")), "messages: expected a turn of .*, got 3 turns"),
        (turns("a", "b", roles=("system", "user")), "messages: expected a turn of the user, then .*, got 2 turns"),
        ({"id": "a", "messages": "hello"}, "messages: expected a turn of the user, .* got str"),
        (turns([{"type": "video"}], "b"), "messages: the turn of the user is neither text nor a list of parts"),
        (turns("b", roles=("assistant",)), "no 'question'; every line needs id, question"),
    ],
)
def test_bad_turns_and_pictures_are_named(file, row, message):
    with pytest.raises(UserError, match=r"data .*/train\.jsonl, line 1: " + message):
        answers(file(row))


def test_sft_takes_its_response_from_the_turns(file):
    (row,) = read_jsonl(file(turns("Which?", "B")), ("id", "question", "response"))
    assert row == {"id": "a", "question": "Which?", "response": "B"}


def test_a_benchmark_needs_no_ids(file):
    rows = [{"question": "?", "answer": "1"}, {**GOOD, "id": 7}]
    assert [row["id"] for row in read_questions(file(*rows), "stop", referenced=True, named=False)] == ["1", "7"]
    with pytest.raises(UserError, match=r"line 1: no 'id'"):
        answers(file(*rows))
