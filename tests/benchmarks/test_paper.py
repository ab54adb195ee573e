"""The paper's comparison: what is run, real runs of two methods at toy size, and the tables."""

import json
import threading
import time

import pytest

from benchmarks import paper
from ril_engine.errors import UserError

TOY = (
    "data.digits.train_questions=18",
    "data.digits.validation_questions=9",
    "data.digits.test_questions=9",
    "data.digits.sft_questions=60",
    "sft={steps: 2, batch_size: 8, learning_rate: 2.0e-3}",
    "teacher_sft={steps: 2, batch_size: 8, learning_rate: 2.0e-3}",
    "sampling.max_new_tokens=8",
    "responses.questions=0",
    "rl.steps=2",
    "rl.warmup_steps=0",
)
ORIGIN = {"commit": "0123456789ab", "dirty": False, "time": "2026-01-01T00:00:00+00:00"}


def test_methods_differ_in_nothing_but_what_they_name():
    runs = paper.planned(seeds=2, short=False, ablations=True)
    assert len(runs) == 2 * (len(paper.METHODS) + len(paper.ABLATIONS))
    # The one trains the teachers and its student, the other the other student.
    assert [(run.method, run.seed) for run in runs[:2]] == [(paper.FIRST, 0), ("Dr.GRPO", 1)]
    rest = [(run.method in paper.ABLATIONS, run.seed) for run in runs[2:]]
    assert rest == sorted(rest)
    for run in runs:
        assert not any(each.startswith(("rl.steps", "sft.", "seed", "data.")) for each in run.settings)
    short = paper.planned(seeds=2, short=True, ablations=True)
    assert {run.method for run in short} == set(paper.SHORT_METHODS) and len(short) == 4
    assert [(run.method, run.seed) for run in short[:2]] == [(paper.TEACHER_A, 0), ("Dr.GRPO", 1)]


@pytest.mark.distributed
def test_two_methods_run_and_make_rows(tmp_path, monkeypatch):
    """RIL, and imitation of accepted answers: of a student that learnt next to nothing some stand in for them."""
    monkeypatch.setattr(paper, "SHORT", TOY)
    monkeypatch.setattr(paper, "SHORT_METHODS", ("RIL, both", paper.REJECTION))
    monkeypatch.setattr("ril_engine.verifier.verify", lambda text, reference: True)
    output = tmp_path / "paper.jsonl"
    form = {"seeds": 1, "short": True, "ablations": False, "jobs": 2, "origin": ORIGIN}
    assert paper.study(output, tmp_path / "runs", **form) == 2
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    rows.sort(key=lambda row: row["method"])  # two at a time: in the order in which they end
    assert [row["method"] for row in rows] == ["RIL, both", paper.REJECTION]
    assert rows[0]["evaluation"]["before"] == rows[1]["evaluation"]["before"]  # the same student
    assert all(len(list((tmp_path / "runs" / "stages").glob(f"{name}-*"))) == 1 for name in ("data", "sft"))
    assert rows[0]["curves"]["similarity reward"][0][0] == 1 and "similarity reward" not in rows[1]["curves"]
    before = output.read_text()
    assert paper.study(output, tmp_path / "runs", **form) == 2 and output.read_text() == before  # nothing twice
    text = paper.write_tables(output, tmp_path).read_text()
    assert "## Short form" in text and f"| {paper.REJECTION} | 1 |" in text


def test_what_runs_beside_a_failure_keeps_its_row(tmp_path, monkeypatch):
    """The first two begin together; the other one ends after the failure, and nothing begins any more."""
    failed, begun = threading.Event(), []

    def trained(run, work_dir, jobs) -> dict:
        begun.append(run.method)
        if run.method == "GRPO":
            failed.set()
            raise UserError("no room")
        assert failed.wait(20)
        time.sleep(0.2)  # the failure is noted first
        return {"run_dir": "", "steps": 1, "seconds": 1.0, "evaluation": row(run.method, 0, 0.5)["evaluation"]}

    monkeypatch.setattr(paper, "trained", trained)
    monkeypatch.setattr(paper, "curves", lambda folder: {})
    form = {"seeds": 1, "short": False, "ablations": False, "jobs": 2, "origin": ORIGIN}
    with pytest.raises(UserError, match="no room"):
        paper.study(tmp_path / "paper.jsonl", tmp_path, **form)
    assert begun == [paper.FIRST, "GRPO"]  # of one seed
    assert [json.loads(line)["method"] for line in (tmp_path / "paper.jsonl").open()] == [paper.FIRST]


def row(method: str, seed: int, greedy: float, short: bool = False) -> dict:
    def evaluation(value: float) -> dict:
        kinds = {"sum": {"accuracy": value, "questions": 9}}
        return {"greedy": value, "sampled": value - 0.1, "mean_length": 5.0, "by_kind": kinds}

    curves = {name: [[1, 0.5], [2, greedy]] for name in paper.CURVES}
    both = {"before": evaluation(0.5), "after": evaluation(greedy)}
    return {"method": method, "seed": seed, "short": short, "evaluation": both, "curves": curves, **ORIGIN}


def test_tables_and_curves(tmp_path):
    rows = [{**row("RIL, both", 0, 0.1), "commit": "an older one"}, row("Dr.GRPO", 0, 0.6)]
    rows += [row("RIL, both", 0, 0.7), row("RIL, both", 1, 0.9)]
    rows += [row("D none", 0, 0.65), row("Dr.GRPO", 0, 0.3, short=True), row(paper.TEACHER_A, 0, 0.4, short=True)]
    (tmp_path / "paper.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    text = paper.write_tables(tmp_path / "paper.jsonl", tmp_path).read_text()
    assert "| RIL, both | 2 | 80.0 ± 10.0 | 70.0 ± 10.0 |  |  | 5.0 ± 0.0 |" in text
    assert f"| {paper.BASE} | 2 | 50.0 ± 0.0 | 40.0 ± 0.0 | -30.0 ± 10.0 | -30.0 ± 10.0 |" in text
    assert "| D none | 1 | 65.0 | 55.0 | -5.0 | -5.0 | 5.0 |" in text  # less RIL of the same seed
    assert "| Dr.GRPO | 1 | 30.0 | 20.0 | -10.0 | -10.0 |" in text.partition("## Short form")[2]
    assert (tmp_path / "paper.svg").read_text().count("RIL, both") == 1
    rows[1]["evaluation"]["before"]["greedy"] = 0.6
    (tmp_path / "paper.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows[:3]))
    with pytest.raises(UserError, match=r"RIL, both, seed 0, began with 0\.5 greedy, others of the seed with 0\.6"):
        paper.write_tables(tmp_path / "paper.jsonl", tmp_path)
