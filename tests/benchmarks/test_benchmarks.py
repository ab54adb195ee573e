"""The benchmark suite: nothing wrong is timed, rows say where they come from, the table holds the newest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import runner
from benchmarks.cases import all_cases, group_advantages_case, token_logprob_case
from benchmarks.report import write_results
from ril_engine.errors import UserError

ROOT = Path(__file__).parents[2]


def small():
    case = token_logprob_case(8, 4, 16, torch.float32, "cpu")
    for name in ("compiled reference", "TRL ChunkedLogProbFunction", "TRL selective_log_softmax"):
        case.candidates.pop(name, None)  # slow to compile, or not installed everywhere; `make bench` has them
    return case


def test_a_wrong_candidate_is_found_and_not_timed(tmp_path, monkeypatch, capsys):
    def slightly_off(**inputs):
        output, *gradients = small().candidates["reference"](**inputs)
        return output, *(gradient * 1.001 for gradient in gradients)

    case = small()
    case.candidates |= {
        "off": slightly_off,
        "nan": lambda **inputs: tuple(x * torch.nan for x in slightly_off(**inputs)),
    }
    faults = runner.wrong(case)
    assert set(faults) == {"off", "nan"} and "gradient of hidden is off by" in faults["off"]
    monkeypatch.setattr(command, "all_cases", lambda device: [lambda: case])
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", "--allow-dirty", "--output", str(tmp_path / "rows.jsonl")])
    assert command.main() == 2
    assert "error: 2 wrong results, first: token_logprob" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_every_candidate_that_needs_no_compiler_is_right():
    for build in all_cases("cpu"):
        case = build()
        case.candidates.pop("compiled reference", None)
        assert runner.wrong(case) == {}, case.name


def test_rows_hold_numbers_and_origin(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "all_cases", lambda device: [small, lambda: group_advantages_case(8, "cpu")])
    output = tmp_path / "rows.jsonl"
    arguments = ["run", "--allow-dirty", "--rounds", "3", "--case", "token_logprob", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert command.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": 3, "output": str(output)}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["candidate"] for row in rows] == ["reference", "ril_kernels", "floor"]
    for row in rows:
        assert row["latency_ms"]["p20"] <= row["latency_ms"]["p50"] <= row["latency_ms"]["p80"]
        assert row["gemm_flops"] == 6 * 8 * 4 * 16 and row["device"] == "cpu" and len(row["commit"]) == 40
        assert row["command"].endswith(" ".join(arguments)) and row["versions"]["torch"] in torch.__version__
    assert rows[0]["ratio"] == {"p20": 1.0, "p50": 1.0, "p80": 1.0} and rows[2]["floor_share"] == 1.0
    # 8 x 16 logits and their gradient alone are 1 KiB.
    assert 2 * 8 * 16 * 4 / 2**20 < rows[0]["peak_mib"] < 0.1


def test_memory_is_the_peak_not_the_sum():
    def work():
        for _ in range(5):
            torch.empty(2**18).fill_(1.0)  # 1 MiB each, one at a time

    assert runner._peak_mib(work, "cpu") == pytest.approx(1.0, abs=0.01)


def test_the_table_holds_the_newest_row_and_says_what_never_ran(tmp_path):
    numbers = {
        "reference": {
            "latency_ms": dict.fromkeys(("p20", "p50", "p80"), 2.0),
            "ratio": dict.fromkeys(("p20", "p50", "p80"), 1.0),
            "floor_share": 0.5,
            "peak_mib": 3.0,
        }
    }
    origin = runner.provenance("cpu", "a" * 40, False)
    rows = runner.rows_of(small(), numbers, 3, origin)
    runner.append(tmp_path / "cpu.jsonl", rows)
    numbers["reference"]["floor_share"] = 0.25
    runner.append(tmp_path / "cpu.jsonl", runner.rows_of(small(), numbers, 3, {**origin, "commit": "b" * 40}))
    text = write_results(tmp_path, tmp_path / "RESULTS.md").read_text()
    assert "Nothing here was run on a GPU" in text and "| 25% |" in text and "50%" not in text and "bbbbbbbbb |" in text
    runner.append(tmp_path / "cuda.jsonl", [{**rows[0], "device": "cuda", "device_name": "a GPU"}])
    text = write_results(tmp_path, tmp_path / "RESULTS.md").read_text()
    assert "Nothing here was run on a GPU" not in text and "## a GPU" in text
    with pytest.raises(UserError, match="no rows; run `python -m benchmarks run` first"):
        write_results(tmp_path / "none", tmp_path / "RESULTS.md")


def test_a_changed_tree_is_noticed_but_not_its_results(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "cpu.jsonl").write_text("{}")
    commit, dirty = runner.git_state(tmp_path)
    assert len(commit) == 40 and not dirty
    (tmp_path / "a.py").write_text("2")
    assert runner.git_state(tmp_path) == (commit, True)


@pytest.mark.parametrize(
    ("arguments", "state", "message"),
    [
        (["run"], ("a" * 40, True), "error: the working tree differs from its commit"),
        (["run", "--rounds", "0"], ("a" * 40, False), "error: --rounds 0: expected 1 or more; 30 is usual"),
        (["run", "--case", "nobody"], ("a" * 40, False), "error: --case nobody: no such case; expected part of one of"),
        pytest.param(
            ["list", "--device", "cuda"],
            ("a" * 40, False),
            "error: --device cuda: no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_errors_are_one_line(arguments, state, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "all_cases", lambda device: [small])
    monkeypatch.setattr(runner, "git_state", lambda root: state)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert command.main() == 2
    assert message in capsys.readouterr().err
