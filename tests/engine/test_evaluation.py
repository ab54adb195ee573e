"""Comparison of runs: a paired bootstrap over questions and runs."""

import json

import pytest
import torch

from ril_engine.errors import UserError
from ril_engine.evaluation import compare


@pytest.fixture
def make(tmp_path):
    """A run's folder with its answers; correct[i] is the reward of question i, greedy and sampled alike."""

    def run(name, correct):
        (tmp_path / name).mkdir()
        rows = [{"id": f"q{i}", "greedy": float(c), "sampled": float(c)} for i, c in enumerate(correct)]
        (tmp_path / name / "evaluation_after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return run


def test_questions_are_paired(make):
    generator = torch.Generator().manual_seed(0)
    two = torch.rand(400, generator=generator) < 0.5
    one = two.clone()
    one[:20] = ~two[:20]  # net of +20 - 2 x (what was right before)
    a, b = make("a", one.tolist()), make("b", two.tolist())
    result = compare([a], [b], draws=2000)["greedy"]
    gain = (one.double().mean() - two.double().mean()).item()
    assert result["difference"] == pytest.approx(gain)
    # 20 of 400 differences are +-1: the standard error is near sqrt(20)/400, not the unpaired sqrt(2 x 0.25/400).
    half = (result["interval"][1] - result["interval"][0]) / 2
    assert half == pytest.approx(1.96 * 20**0.5 / 400, rel=0.15)
    assert compare([a], [a], draws=50)["sampled"]["interval"] == [0.0, 0.0]


def test_runs_that_differ_widen_the_interval(make):
    steady = [make(f"s{i}", [1, 1, 1, 0] * 50) for i in range(3)]
    good, bad = make("good", [1] * 200), make("bad", [0] * 150 + [1] * 50)
    narrow = compare(steady, [make("c", [1, 1, 0, 0] * 50)], draws=500)["greedy"]
    wide = compare([good, good, bad], [make("d", [1, 1, 0, 0] * 50)], draws=500)["greedy"]
    assert narrow["difference"] == pytest.approx(wide["difference"]) == pytest.approx(0.25)
    assert narrow["interval"][0] > 0 > wide["interval"][0]


def test_runs_of_one_seed_are_paired(make):
    good, bad = [1] * 150 + [0] * 50, [0] * 150 + [1] * 50
    one = [make("one", good), make("two", bad)]
    two = [make("three", [0, *good[1:]]), make("four", [*bad[:-1], 0])]
    in_order = compare(one, two, draws=500)["greedy"]
    crossed = compare(one, two[::-1], draws=500)["greedy"]
    assert in_order["interval"][0] >= 0 > crossed["interval"][0]


def test_what_cannot_be_compared_is_said(make, tmp_path):
    one, two = make("one", [1, 0]), make("two", [1, 0, 1])
    with pytest.raises(UserError, match=r"run .*two: not evaluated on the questions of .*one"):
        compare([one], [two])
    with pytest.raises(UserError, match=r"no evaluation_after.jsonl there; expected the folder of a run"):
        compare([one], [tmp_path])
