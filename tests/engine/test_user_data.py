"""Data sets that users bring: Parquet, and what `ril data-check` tells."""

import io
import json
import sys

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from ril_engine import cli, models, stages, tiny_models
from ril_engine.config import Config
from ril_engine.errors import UserError
from ril_engine.models import read_image
from ril_engine.questions import (
    LINE_BYTES,
    checked_rows,
    evaluation_questions,
    pictures,
    read_jsonl,
    training_questions,
)

PICTURE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})  # the Image of Hugging Face's datasets


def png(colour: str, size: tuple[int, int] = (8, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png("red"), png("blue")


def write(path, image: list[dict], **columns) -> None:
    columns = {name: columns[name] for name in columns if columns[name] is not None}
    arrays = {"image": pyarrow.array(image, PICTURE), **{name: pyarrow.array(each) for name, each in columns.items()}}
    parquet.write_table(pyarrow.table(arrays), path, row_group_size=1)


def three(path, image=None, **changes) -> None:
    """Three questions: a picture in the file, one beside it, and none."""
    image = image or [{"bytes": RED, "path": "no.png"}, {"bytes": None, "path": "blue.png"}, None]
    columns = {"id": [1, 2, 3], "question": ["a?", "b?", "c?"], "answer": ["x", "y", "z"]}
    write(path, image, **{**columns, "thumbnail": [b"1", b"2", b"3"], **changes})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "blue.png").write_bytes(BLUE)
    return tmp_path / "data"


def config(folder, **settings) -> Config:
    teachers = [{"name": "t", "path": "p"}]
    return Config.model_validate(
        {"data": {"dir": str(folder)}, "work_dir": str(folder.parent / "runs"), "teachers": teachers, **settings}
    )


def test_parquet_is_read_as_json_lines_are(folder):
    three(folder / "train-00000-of-00002.parquet")
    three(folder / "train-00001-of-00002.parquet", id=[4, 5, 6])
    turns = [[{"role": "user", "content": "<image>How?"}, {"role": "assistant", "content": "so"}]] * 3
    three(folder / "test.parquet", question=None, answer=None, messages=turns, image=[{"bytes": BLUE, "path": ""}] * 3)
    job = config(folder)
    data_dir, key = stages.data(job)
    rows = training_questions(job, data_dir)
    assert [row["id"] for row in rows] == list("123456") and [row["answer"] for row in rows] == list("xyzxyz")
    assert all("thumbnail" not in row for row in rows)  # bytes that are no picture
    colours = [[read_image(data_dir, name, 32).getpixel((0, 0)) for name in pictures(row)] for row in rows]
    assert colours == [[(255, 0, 0)], [(0, 0, 255)], []] * 2
    asked = evaluation_questions(job, data_dir)
    assert [(row["question"], row["answer"]) for row in asked] == [("How?", "so")] * 3
    assert len(list((data_dir / "images").iterdir())) == 2  # each picture once
    three(folder / "sft.parquet", [{"bytes": RED, "path": ""}] * 3, question=None, answer=None, messages=turns)
    taught = read_jsonl(stages.data(job)[0] / "sft.jsonl", ("id", "question", "response"))
    assert [row["response"] for row in taught] == ["so"] * 3
    (folder / "sft.parquet").unlink()
    assert stages.data(job) == (data_dir, key)
    three(folder / "train-00001-of-00002.parquet", id=[4, 5, 7])
    assert stages.data(job)[1] != key


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"bytes": None, "path": "../blue.png"}, r"row 2: image '\.\./blue\.png': outside the dataset folder"),
        ({"bytes": None, "path": "red.png"}, r"row 2: image .*red\.png: no such file; its question names it"),
        (
            {"bytes": png("red", (33, 1)), "path": "a"},
            r"row 2: image in the row: 33 x 1 pixels, more than data\.max_im",
        ),
        ({"bytes": RED + b" " * 4000, "path": "a"}, r"row 2: image in the row: more than 4000 bytes; make it smaller"),
        ({"bytes": b"\x80\x04K\x01.", "path": "a"}, r"row 2: image in the row: not a readable picture; expected PNG"),
        ({"bytes": RED[:45], "path": "a"}, r"row 2: image in the row: not a readable picture; expected PNG"),
        ({"bytes": None, "path": None}, r"row 2: image is None, expected a path inside the folder"),
    ],
)
def test_a_bad_picture_of_a_parquet_file_is_named(folder, image, message, monkeypatch):
    monkeypatch.setattr(models, "IMAGE_BYTES", 4000)
    three(folder / "train.parquet", [{"bytes": RED, "path": ""}, image, None])
    with pytest.raises(UserError, match=r"data .*train\.parquet, " + message):
        stages.data(config(folder, data={"dir": str(folder), "max_image_pixels": 32}))


def test_what_is_no_parquet_is_one_line(folder):
    (folder / "train.parquet").write_text("{}")
    with pytest.raises(UserError, match=r"data .*train\.parquet, after row 0: not readable as Parquet \("):
        stages.data(config(folder))
    three(folder / "train.parquet")
    whole = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[:40] + b"\xff" * 200 + whole[240:])
    with pytest.raises(UserError, match=r"data .*train\.parquet, (after )?row \d: ") as caught:
        stages.data(config(folder))
    assert "\n" not in str(caught.value)
    (folder / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"train\.jsonl and train\.parquet are one split; remove one of them"):
        stages.data(config(folder))


def test_a_row_of_parquet_is_bounded(folder):
    three(folder / "train.parquet", question=["a?", "b" * LINE_BYTES, "c?"])
    found = [row for _, row in checked_rows(folder / "train.parquet", ("question",))]
    assert found[1].startswith(f"longer than {LINE_BYTES} bytes") and found[2]["question"] == "c?"


@pytest.fixture
def ril(monkeypatch, capsys):
    def call(*words) -> tuple[int, list[str], dict | None]:
        monkeypatch.setattr(sys, "argv", ["ril", *map(str, words)])
        monkeypatch.setattr(cli, "leave", lambda code: code)  # the job of one that other tests share goes on
        code = cli.main()
        out, err = capsys.readouterr()
        return code, err.splitlines(), json.loads(out.splitlines()[-1]) if out else None

    return call


def test_data_check_tells_of_every_bad_row(folder, ril):
    rows = [
        {"id": "a", "question": "?", "answer": "1", "image": "blue.png", "kind": "sum"},
        {"id": "b", "question": "?", "image": "none.png", "answer": "1"},
        {"id": "a", "question": "?", "answer": "1"},
        {"question": "?", "answer": "1"},
        {"id": "e", "question": "?"},
        {"id": "f", "question": "?", "answer": "1"},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    (folder / "sft.jsonl").write_text(json.dumps({"id": "a", "question": "?", "response": "2"}) + "\n")
    three(folder / "test.parquet", [{"bytes": b"no", "path": ""}, None, None])
    code, told, found = ril("data-check", folder)
    lines = [(f"data {folder}/train.jsonl, line {n}: ", what) for n, what in (
        (2, "no such file"), (3, "the id 'a' of data"), (4, "no 'id'"), (5, "no 'answer'"), (7, "not JSON"),
    )]  # fmt: skip
    lines += [
        (f"data {folder}/test.parquet, row 1: ", "not a readable picture"),
        (f"error: data {folder}: ", "6 faults"),
    ]
    assert code == 2 and len(told) == len(lines)
    for line, (where, what) in zip(told, lines, strict=True):
        assert line.startswith(where) and what in line
    counts = {"with_reference": 2, "without_reference": 0, "images": 1}
    assert found["files"]["train.jsonl"] == {"rows": 7, "bad": 5, "kinds": {"sum": 1, "question": 1}, **counts}
    assert found["files"]["sft.jsonl"]["with_reference"] == 1 and (found["rows"], found["bad"]) == (11, 6)
    (folder / "validation.parquet").write_text("{}")
    assert "validation.parquet, after row 0: not readable as Parquet" in "".join(ril("data-check", folder)[1])
    code, told, found = ril("data-check", folder / "sft.jsonl")
    assert (code, told, found["rows"]) == (0, [], 1)
    assert "nothing to check there; expected a folder" in ril("data-check", folder / "no.jsonl")[1][0]
    assert "--set seed=1: no effect without --config" in ril("data-check", folder, "--set", "seed=1")[1][0]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Made before the test captures output: transformers keeps the stderr that it meets first."""
    path = tmp_path_factory.mktemp("student")
    tiny_models.build(path, "tiny:student", [], seed=0)
    return path


@pytest.mark.parametrize("tiny", [False, True], ids=["checkpoint", "tiny"])
def test_data_check_with_a_student_counts_its_tokens(student, folder, ril, tmp_path, tiny):
    rows = [{"id": str(i), "question": "What is the left digit?" * (i + 1), "image": "blue.png"} for i in range(3)]
    rows[2]["question"] += "<|im_end|>"
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    which = "" if tiny else f", student: {{path: {student}}}, sft: {{steps: 0}}"
    (tmp_path / "c.yaml").write_text(f"{{answer_rewards: [], teachers: [{{name: t, path: p}}]{which}}}")
    code, told, found = ril("data-check", folder, "--config", tmp_path / "c.yaml")
    told = [line for line in told if line.startswith(("data ", "error: "))]
    missing = ["test", "sft"] if tiny else ["test"]
    assert code == 2 and len(told) == len(missing) + 2
    for line, name in zip(told, missing, strict=False):
        assert line == f"data {folder}: no {name}.jsonl or {name}.parquet, which the config needs"
    assert "line 3: question 2: its text holds a special token of the model" in told[-2]
    lengths = found["files"]["train.jsonl"]["prompt_tokens"]
    assert 5 < lengths["min"] < lengths["max"] < 100 and found["files"]["train.jsonl"]["without_reference"] == 2
