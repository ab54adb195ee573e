"""Answer rewards of the teachers' saved responses: stored once, shared by the ranks, and nothing lost on a failure."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ril_engine import saved_responses, stages, teacher_scores
from ril_engine.config import Config, FunctionConfig
from ril_engine.config_file import load_config
from ril_engine.errors import UserError

ROOT = Path(__file__).parents[2]
QUESTIONS = [{"id": f"q{i}", "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(5)]
# A reward for a test: half the length of a response; none for one that is empty of digits.
REWARD = """
from pathlib import Path
def half(questions, references, responses, **columns):
    with Path(__file__).with_name("asked.txt").open("a") as file:
        file.writelines(f"{question}|{response}\\n" for question, response in zip(questions, responses))
    return [len(response) / 2 if any(map(str.isdigit, response)) else None for response in responses]
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A config file of a job with one teacher, whose responses are in a file, and one answer reward, a function."""
    from ril_engine import tiny_models

    tiny_models.build(tmp_path / "student", "tiny:student", [], 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    rows = [{"id": row["id"], "text": text} for row in QUESTIONS for text in ("It is " + row["answer"], row["answer"])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "half_the_length.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "half_the_length", raising=False)
    settings = {
        "work_dir": str(tmp_path / "runs"),
        "data": {"dir": str(tmp_path / "data")},
        "student": {"path": str(tmp_path / "student")},
        "teachers": [{"name": "a", "responses": str(tmp_path / "a.jsonl")}],
        "rl": {"group_size": 2},
        "answer_rewards": [{"kind": "function", "function": "half_the_length:half"}],
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path / "config.json"


def score(config: Config):
    data_dir, data_key = stages.data(config)
    file = saved_responses.file_responses(config, config.teachers[0], config.student.path, data_dir, data_key)
    return teacher_scores.scored_responses(config, {"a": file}, data_dir)["a"]


def folders(config: Config) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (config.work_dir / "stages").iterdir()}


def test_scores_are_stored_once_and_another_reward_generates_nothing_anew(job):
    config, asked = load_config(job), job.with_name("asked.txt")
    saved = score(config)
    assert {id: [each["text"] for each in some] for id, some in saved.items()} == {
        row["id"]: ["It is " + row["answer"], row["answer"]] for row in QUESTIONS
    }
    assert [[each["answer_reward"] for each in some] for some in saved.values()] == [[3.5, 0.5]] * 5
    assert all(each["source"] == "a" and not each["truncated"] for some in saved.values() for each in some)
    first, lines = folders(config), asked.read_text()
    assert lines.count("\n") == 10 and "What is 0 + 1?|It is 1\n" in lines
    assert score(config) == saved and folders(config) == first and asked.read_text() == lines

    right = score(load_config(job, ["answer_rewards=[{kind: verifier}]"]))
    assert {each["answer_reward"] for some in right.values() for each in some} == {1.0}
    assert [name.partition("-")[0] for name in folders(config).keys() - first.keys()] == ["scores_a"]
    assert first.items() <= folders(config).items()
    none = score(load_config(job, ["answer_rewards=[]"]))
    assert {each["answer_reward"] for some in none.values() for each in some} == {0.0}


def test_a_changed_function_scores_anew(job):
    config = load_config(job)
    score(config)
    job.with_name("half_the_length.py").write_text(REWARD.replace("/ 2", "/ 4"))
    score(config)
    assert sum(name.startswith("scores_a-") for name in folders(config)) == 2
    (job.parent / "broken").mkdir()
    (job.parent / "broken" / "__init__.py").write_text("raise RuntimeError('not today')")
    for function in ("no_such_module:half", "no.such.module:half", "broken.module:half"):
        with pytest.raises(UserError, match=f"answer reward {function}: .*: .*; it must import"):
            teacher_scores._decisive(FunctionConfig(function=function))


def test_where_a_judge_is_asked_does_not_count():
    def decisive(**changes) -> dict:
        server = {"url": "http://h/v1", "model": "m"} | changes.pop("server", {})
        judge = {"kind": "judge", "server": server} | changes
        return teacher_scores._decisive(Config(rl={"algorithm": "grpo"}, answer_rewards=[judge]).answer_rewards[0])

    moved = {"url": "http://other/v1", "concurrency": 2, "timeout_s": 9, "attempts": 1, "api_key_env": "KEY"}
    assert decisive() == decisive(server=moved)
    # What failed with "zero" is no score for a run with "stop".
    for change in ({"server": {"model": "n"}}, {"mode": "explain"}, {"on_failure": "zero"}, {"weight": 2.0}):
        assert decisive() != decisive(**change)
    assert decisive(mode="explain") != decisive(mode="explain", max_new_tokens=3)


def test_what_could_not_be_scored_is_told(job, capsys):
    with job.with_name("a.jsonl").open("a") as file:
        file.writelines(json.dumps({"id": f"q{i}", "text": "no idea"}) + "\n" for i in (0, 3))
    config = load_config(job)
    assert [each["answer_reward"] for each in score(config)["q3"]] == [3.5, 0.5, 0.0]
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    (folder,) = (config.work_dir / "stages").glob("scores_a-*")
    assert err == [
        "warning: teacher a: 2 of 12 responses could not be scored in full, which counts as 0; "
        f"remove {folder} to score them again"
    ]


RANK = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from ril_engine import saved_responses, stages, teacher_scores
from ril_engine.config_file import load_config
from ril_engine.errors import UserError
rank = int(sys.argv[3])
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, rank == 0, timedelta(seconds=200))  # the imports differ in time
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=3))
config = load_config(sys.argv[1])
data_dir, data_key = stages.data(config)
files = {"a": saved_responses.file_responses(config, config.teachers[0], config.student.path, data_dir, data_key)}
for _ in range(2):
    try:
        saved = teacher_scores.scored_responses(config, files, data_dir)["a"]
        print([[each["answer_reward"] for each in some] for some in saved.values()])
    except UserError as error:
        print(error)
"""
# Rank 1 is slow the first time and then fails: the ranks' own time-out is shorter than what rank 0 waits for it.
FAILS = """
import time
from ril_engine.errors import UserError
import torch.distributed as dist
asked = 0
def half(questions, references, responses, **columns):
    global asked
    asked += 1
    if dist.get_rank() == 1 and asked == 1:
        time.sleep(5)
        raise UserError("the judge is down; see to it and start again")
    return [len(response) / 2 for response in responses]
"""


@pytest.mark.distributed
def test_a_judge_that_fails_on_one_rank_stops_both_with_its_message(job):
    job.with_name("half_the_length.py").write_text(FAILS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, job, port, str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(job.parent), *sys.path])},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=200)[0].splitlines()[-2:] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0] and said[0] == said[1]
    assert "the judge is down; see to it and start again" in said[0][0]
    assert said[0][1] == str([[3.5, 0.5]] * 5)  # in the order of the responses, whoever scored them
