"""Comparison of runs: a paired bootstrap over questions and runs."""

import json
from pathlib import Path

import pytest
import torch

from ril_engine import cli, digits, tiny_models
from ril_engine.config import DigitsConfig
from ril_engine.errors import UserError, exit_code
from ril_engine.evaluation import compare, interval


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


def test_intervals():
    assert interval([1.0] * 8 + [0.0] * 2) == pytest.approx([0.4902, 0.9433], abs=1e-4)  # Wilson's, from tables
    assert interval([1.0] * 10) == pytest.approx([0.7225, 1.0], abs=1e-4)
    assert interval([0.5, 1.0, 1.5, 2.0]) == pytest.approx([1.25 - 0.6326, 1.25 + 0.6326], abs=1e-4)


def test_any_file_of_questions_is_measured_by_the_answer_rewards(tmp_path, alone, capfd, monkeypatch):
    sizes = DigitsConfig(train_questions=9, validation_questions=1, test_questions=1, sft_questions=1)
    (tmp_path / "data").mkdir()
    digits.build(tmp_path / "data", sizes)
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()[:6]]
    asked = [
        {"question": row["question"], "answer": "7", "images": [row["image"]], "kind": "ab"[i % 2]}
        for i, row in enumerate(rows)
    ]
    file = tmp_path / "data" / "benchmark.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    tiny_models.build(tmp_path / "student", "tiny:student", [], seed=0)
    (tmp_path / "count_reward.py").write_text(
        "def count(questions, references, responses, **_): return [1 + len(r) for r in responses]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "config.yaml").write_text(
        f"work_dir: {tmp_path / 'runs'}\nteachers: [{{name: t, path: p}}]\n"
        "sampling: {max_new_tokens: 8, stop: [a, e, i, ' ', '1']}\n"
        "answer_rewards: [{kind: function, function: 'count_reward:count', weight: 0.5}, {kind: verifier}]"
    )

    def ril(*words) -> tuple[int, str, str]:
        arguments = cli._parser().parse_args(["evaluate", "--config", str(tmp_path / "config.yaml"), *map(str, words)])
        code = exit_code(lambda: cli._run(arguments))
        return code, *capfd.readouterr()

    code, out, err = ril("--student", tmp_path / "student", "--data", file)
    assert code == 0, err[-2000:]
    result = json.loads(out.splitlines()[-1])
    found = [json.loads(line) for line in Path(result["answers"]).read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in found] == list("123456") and [row["kind"] for row in found] == list("ababab")
    for mode in ("greedy", "sampled"):
        counts = [0.5 * (1 + len(row[f"{mode}_text"])) for row in found]
        assert all(row[mode] in (0.0, count, count + 1) for row, count in zip(found, counts, strict=True))
        assert result[mode] == pytest.approx(sum(row[mode] for row in found) / 6) and result[mode] > 0
    assert result["by_kind"]["b"]["accuracy"] == pytest.approx(sum(row["greedy"] for row in found[1::2]) / 3)
    assert result["by_kind"]["b"]["interval"] == interval([row["greedy"] for row in found[1::2]])
    assert result["questions"] == 6
    for words, message in (
        (("--data", file), "--data without --student: name the checkpoint to evaluate"),
        (("--student", "s", "--data", tmp_path / "no.jsonl"), "no.jsonl: no such file; give a .jsonl or .parquet"),
        (("--student", "s", "--data", file, "--set", "answer_rewards=[]"), "answer_rewards is empty: --data measures"),
    ):
        code, _, err = ril(*words)
        assert code == 2 and message in err
