"""A teacher's responses from a file: what is taken, refused, cut and left out."""

import itertools
import json
import re

import pytest

from ril_engine import stages, tiny_models
from ril_engine.config import Config, ModelConfig
from ril_engine.errors import UserError
from ril_engine.models import Encoder, load, load_tokenizer
from ril_engine.saved_responses import file_responses, taught_questions

QUESTIONS = [{"id": f"q{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)]
LIMIT = 12  # sampling.max_new_tokens


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    tiny_models.build(path, "tiny:student", [], 0)
    return str(path)


@pytest.fixture
def job(tmp_path, student):
    """A job of two questions' responses each of `rows`, and what its stage then holds."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    class Job:
        def config(self, rows: list, **settings) -> Config:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / "a.jsonl").write_text("\n".join(lines))
            return Config.model_validate(
                {
                    "work_dir": tmp_path / "runs",
                    "data": {"dir": str(tmp_path / "data")},
                    "student": {"path": student},
                    "sampling": {"max_new_tokens": LIMIT},
                    "teachers": [{"name": "a", "responses": tmp_path / "a.jsonl"}],
                    "rl": {"group_size": 2},
                }
                | settings
            )

        def read(self, config: Config) -> list[dict]:
            path = file_responses(config, config.teachers[-1], student, *stages.data(config))
            return [json.loads(line) for line in path.read_text().splitlines()]

        def taught(self, config: Config) -> list[str]:
            return [row["id"] for row in taught_questions(config, student, *stages.data(config))]

    return Job()


def row(question: int, text: str, **more) -> dict:
    return {"id": f"q{question}", "text": text, **more}


def good(*questions: int) -> list[dict]:
    return [row(i, text) for i in questions for text in (f"It is {i + 1}.", f"{i + 1}")]


def test_a_good_file_keeps_its_order_and_where_it_came_from(job, capsys):
    rows = [*good(3, 0, 1), row(2, " one "), row(2, "two", truncated=True), row(2, "1" * 2, truncated=False)]
    saved = job.read(job.config(rows))
    assert [(each["id"], each["sample"]) for each in saved] == [
        *((f"q{i}", n) for i in (0, 1) for n in range(2)),
        *(("q2", n) for n in range(3)),
        *(("q3", n) for n in range(2)),
    ]
    assert [(each["text"], each["truncated"]) for each in saved[4:7]] == [("one", False), ("two", True), ("11", False)]
    assert {each["source"] for each in saved} == {"a"} and "answer_reward" not in saved[0]
    assert re.fullmatch(r".*/a\.jsonl, sha256 [0-9a-f]{64}", saved[0]["model"])
    assert not capsys.readouterr().err


BAD = [
    *good(0, 1),
    "{",
    "[]",
    {"id": "q1"},
    {"id": None, "text": "7"},
    row(1, 7),
    row(1, "7", truncated="no"),
    row(9, "who asked?"),
    row(1, " It is 2. "),
    row(1, "\n"),
    row(2, "3"),
    row(2, "so it is odd. " * 9),
    row(3, "4"),
]
FOUND = (
    r"teacher a, file .*/a\.jsonl: lines that are no object: 2 \(first: line 5, not JSON \(.*\)\), "
    r"lines without id, text or a good truncated: 4 \(first: line 7, text\), "
    r"responses to no training question: 1 \(first: line 11, id 'q9'\), "
    r"duplicates: 1 \(first: line 12, id 'q1', as in line 3\), "
    r"empty texts: 1 \(first: line 13, id 'q1'\), "
    rf"texts of more than sampling\.max_new_tokens {LIMIT}: 1 \(first: line 15, id 'q2', \d\d tokens\), "
    r"questions with fewer than 2 responses: 1 \(first: 'q3' with 1\)"
)


def test_all_that_is_bad_is_one_line(job, capsys):
    with pytest.raises(UserError, match=FOUND + "; mend the file, or set on_bad_data: skip to leave these out$"):
        job.read(job.config(BAD))
    assert not capsys.readouterr().err


def test_bad_rows_are_left_out_with_one_warning(job, student, capsys):
    config = job.config(BAD, on_bad_data="skip")
    saved = job.read(config)
    assert [each["id"] for each in saved] == ["q0", "q0", "q1", "q1", "q2", "q2", "q3"]
    cut = saved[5]
    assert cut["truncated"] and cut["text"] and ("so it is odd. " * 9).startswith(cut["text"])
    assert len(load_tokenizer(ModelConfig(path=student))(cut["text"])["input_ids"]) == LIMIT
    assert job.taught(config) == ["q0", "q1", "q2"]
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and re.match(f"warning: {FOUND}; over-long texts are cut and the others left", err)


@pytest.mark.parametrize("algorithm", ["ril", "sft", "dr_grpo"])
def test_all_algorithms_train_on_the_same_questions(job, algorithm):
    settings = {"rl": {"group_size": 2, "algorithm": algorithm}, "on_bad_data": "skip"}
    assert job.taught(job.config(good(0, 2), **settings)) == ["q0", "q2"]
    assert job.taught(job.config(good(0, 1, 2, 3), **settings, responses={"questions": 3})) == ["q0", "q1", "q2"]


def test_no_question_left_is_refused(job, tmp_path):
    with pytest.raises(UserError, match=r"fewer than 2 responses: 4 .* leaves no question; mend the file"):
        job.read(job.config([row(0, "1")], on_bad_data="skip"))
    config = job.config(good(0), on_bad_data="skip")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, good(1))))
    two = [{"name": name, "responses": tmp_path / f"{name}.jsonl"} for name in "ab"]
    config = Config.model_validate({**config.model_dump(), "teachers": two})
    with pytest.raises(UserError, match="teachers: no question has enough responses in all of their files; give the"):
        job.taught(config)


def test_a_whole_text_needs_room_for_its_end(job, student):
    tokenizer, text = load_tokenizer(ModelConfig(path=student)), "so it is odd. " * 9
    exact = tokenizer.decode(tokenizer(text)["input_ids"][:LIMIT])
    assert len(tokenizer(exact)["input_ids"]) == LIMIT
    with pytest.raises(UserError, match=rf"q0', {LIMIT} tokens"):
        job.read(job.config([row(0, exact), *good(0, 1, 2, 3)]))
    saved = job.read(job.config([row(0, exact, truncated=True), *good(0, 1, 2, 3)]))
    assert (saved[0]["text"], saved[0]["truncated"]) == (exact.strip(), True)


def test_only_what_counts_makes_it_anew(job, tmp_path):
    paths = set()
    for settings, same in (
        ({}, False),
        ({"seed": 1, "responses": {"per_question": 3}}, True),
        ({"sampling": {"max_new_tokens": 99}}, False),
        ({"on_bad_data": "skip"}, False),  # what it left out would have to be refused
        ({"responses": {"questions": 3}}, False),
    ):
        config = job.config(good(0, 1, 2, 3), **settings)
        path = file_responses(config, config.teachers[0], config.student.path, *stages.data(config))
        assert (path in paths) is same
        paths.add(path)
    changed = job.config(good(3, 1, 2, 0))
    assert file_responses(changed, changed.teachers[0], changed.student.path, *stages.data(changed)) not in paths
    (tmp_path / "data" / "teacher.jsonl").write_text("{}\n")  # beside the questions, but none of their files
    key = stages.data(changed)[1]
    (tmp_path / "data" / "teacher.jsonl").unlink()
    assert stages.data(changed)[1] == key


def test_a_file_that_is_not_there(job, tmp_path, student):
    config = job.config(good(0))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"teacher a, file .*/a\.jsonl: No such file or directory; give a JSONL file"):
        job.read(config)
    with pytest.raises(UserError, match=r"model .*/data: no tokenizer \(.*\); give a Hugging Face checkpoint"):
        load_tokenizer(ModelConfig(path=str(tmp_path / "data")))


def test_text_passes_between_families_unchanged(tmp_path):
    """Qwen's tokenizer cuts numbers into digits, the other family's keeps pairs: only text is the same for both."""
    families = {}
    for name in ("qwen_teacher", "internvl_teacher"):
        tiny_models.build(tmp_path / name, f"tiny:{name}", ["<response></response>"], 0)
        families[name] = Encoder(*load(ModelConfig(path=str(tmp_path / name))), tmp_path, 100)
    assert [len(each.response("56", eos=False)) for each in families.values()] == [2, 1]
    for writer, reader in itertools.permutations(families.values()):
        for text in ("I see 7 and 8. 7*8=56. The answer is 56.", "1234567", "two\n\nlines", "naïve 数 🙂", "a-3.50 %"):
            read = reader.response(writer.decode(writer.response(text)))
            assert reader.decode(read) == text and read != writer.response(text)
