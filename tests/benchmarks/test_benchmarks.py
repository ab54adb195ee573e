"""The benchmark suite: nothing wrong is timed, rows say where they come from, the table holds the newest."""

import json
import subprocess
import sys
from functools import partial
from io import StringIO
from itertools import product
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import runner
from benchmarks.cases import all_cases, group_advantages_case, token_logprob_case
from benchmarks.report import write_results
from benchmarks.summary import WIDTH, print_summary, summary_rows
from ril_engine.errors import UserError
from ril_kernels.token_logprob import memory

ROOT = Path(__file__).parents[2]
NUMBERS = {
    "latency_ms": dict.fromkeys(("p20", "p50", "p80"), 2.0),
    "ratio": {"p20": 0.9, "p50": 1.0, "p80": 1.1},
    "floor_share": 0.5,
    "peak_mib": 3.0,
}


def small():
    case = token_logprob_case("tiny", 8, 4, 16, torch.float32, "cpu")
    case.candidates = {name: case.candidates[name] for name in ("reference", "ril_kernels")}
    return case


def run(monkeypatch, builders, *arguments) -> int:
    monkeypatch.setattr(command, "all_cases", lambda device, full: builders)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run", "--allow-dirty", *map(str, arguments)])
    return command.main()


def test_a_wrong_candidate_is_found_and_not_timed(tmp_path, monkeypatch, capsys):
    class SlightlyOff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.001

    case = small()
    reference = case.candidates["reference"]
    case.candidates |= {
        "off": lambda **inputs: SlightlyOff.apply(reference(**inputs)),
        "nan": lambda **inputs: reference(**inputs) * torch.nan,
    }
    faults = runner.wrong(case)
    assert set(faults) == {"off", "nan"} and "gradient of hidden is off by" in faults["off"]
    output = tmp_path / "rows.jsonl"
    assert run(monkeypatch, [("token_logprob", "tiny", lambda: case)], "--output", output) == 2
    assert "error: 2 wrong results, first: token_logprob" in capsys.readouterr().err
    assert not output.exists()


def test_every_candidate_that_needs_no_compiler_is_right():
    """The scaled default, and the sizes that both ops have in common with every model; test_packing_cases.py and
    test_rollout_cases.py have whole models', which take minutes in float64."""
    checked = ("InternVL3-1B", "Llama-3-8B", "small", "idle")  # every candidate, and odd and even vocabularies
    for op, about, build in all_cases("cpu"):
        if op in ("policy_pack", "rollout"):
            continue
        if op in ("token_logprob", "policy_loss") and not any(name in about for name in checked):
            continue
        case = build()
        case.candidates.pop("torch.compile(reference)", None)
        assert runner.wrong(case) == {}, case.name


def test_rows_hold_numbers_and_origin(tmp_path, monkeypatch, capsys):
    builders = [("token_logprob", "tiny", small)]
    builders.append(("group_advantages", "N=8", partial(group_advantages_case, 8, "cpu")))
    output = tmp_path / "rows.jsonl"
    assert run(monkeypatch, builders, "token_logprob", "--rounds", "3", "--output", output) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": 10, "output": str(output)}
    rows = {(row["candidate"], row["pass"]): row for row in map(json.loads, output.read_text().splitlines())}
    passes = ("no-grad", "forward", "backward", "both")
    assert set(rows) == {*product(("reference", "ril_kernels"), passes), ("floor", "no-grad"), ("floor", "both")}
    for row in rows.values():
        assert row["latency_ms"]["p20"] <= row["latency_ms"]["p50"] <= row["latency_ms"]["p80"]
        assert row["device"] == "cpu" and len(row["commit"]) == 40
        assert "run --allow-dirty token_logprob" in row["command"] and row["versions"]["torch"] in torch.__version__
    assert rows["reference", "both"]["gemm_flops"] == 6 * 8 * 4 * 16 == 3 * rows["floor", "no-grad"]["gemm_flops"]
    assert rows["reference", "both"]["ratio"] == {"p20": 1.0, "p50": 1.0, "p80": 1.0}
    assert rows["floor", "both"]["floor_share"] == 1.0
    # 8 x 16 logits and their gradient alone are 1 KiB.
    assert 2 * 8 * 16 * 4 / 2**20 < rows["reference", "both"]["peak_mib"] < 0.1


def test_a_case_finds_no_memory_of_an_earlier_one(monkeypatch):
    found, trim = [], runner._trim

    def note() -> None:
        memory._kept.memory = torch.empty(3)
        trim()
        found.append(dict(vars(memory._kept)))

    monkeypatch.setattr(runner, "_trim", note)
    monkeypatch.setattr(runner, "peak_mib", lambda function, device: found.append("timed"))
    runner.measure(small(), "cpu", rounds=1)
    assert found[0] == {} and found[1] == "timed"


def test_both_is_the_sum_of_forward_and_backward():
    numbers = runner.measure(small(), "cpu", rounds=1)  # of one round: medians of several do not add up
    for name in ("reference", "ril_kernels"):
        forward, backward, both = (numbers[name, each]["latency_ms"]["p50"] for each in ("forward", "backward", "both"))
        assert both == pytest.approx(forward + backward, rel=1e-9) and min(forward, backward) > 0


def test_cases_bear_the_names_of_models():
    for full, models in ((False, 5), (True, 8)):  # heads that are alike once scaled are left out
        ops = [op for op, *_ in all_cases("cpu", full)[: 2 * models + 1]]
        assert ops == ["token_logprob"] * models + ["policy_loss"] * (models + 1)
    scaled = all_cases("cpu")[1][2]
    assert scaled.args[:4] == ("InternVL3-1B (H/4, V/16)", 128, 224, 9479)
    assert all_cases("cpu", full=True)[10][2].args[:4] == ("InternVL3-1B", 1024, 896, 151_674)
    assert all_cases("cuda")[5][2].args[:5] == ("Llama-3-8B", 8192, 4096, 128_256, torch.bfloat16)


def test_a_gpu_has_all_cases_in_bfloat16():
    on_gpu = all_cases("cuda")
    names = {(op, name) for op, name, _ in on_gpu}
    models = ("policy_pack", "rollout", "step")
    assert {(op, name) for op, name, _ in all_cases("cpu", full=True) if op in models} < names
    assert {(op, "14 x 14 picture, widths of 3B") for op in models[:2]} < names
    for op, name, build in on_gpu:
        if op != "group_advantages":
            assert {*build.args[-2:], *build.keywords.values()} >= {torch.bfloat16, "cuda"}, name


def test_ops_and_parts_of_names_select_cases(monkeypatch, capsys):
    def large():
        raise AssertionError("only what is wanted is built")

    builders = [("token_logprob", "a large one", large), ("token_logprob", "tiny", small)]
    builders.append(("group_advantages", "N=8", partial(group_advantages_case, 8, "cpu")))
    monkeypatch.setattr(command, "all_cases", lambda device, full: builders)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "list", "--case", "N=8"])
    assert command.main() == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["cases"]) == ["group_advantages N=8"]
    for candidate, expected in (("kernels", ["reference", "ril_kernels"]), ("nobody", ["reference"])):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "list", "--case", "tiny", "--candidate", candidate])
        assert command.main() == 0
        assert list(json.loads(capsys.readouterr().out.splitlines()[-1])["cases"].values()) == [expected]


def test_memory_is_the_peak_not_the_sum():
    def work():
        for _ in range(5):
            torch.empty(2**18).fill_(1.0)  # 1 MiB each, one at a time

    assert runner.peak_mib(work, "cpu") == pytest.approx(1.0, abs=0.01)


def test_the_table_holds_the_newest_row_and_says_what_never_ran(tmp_path):
    origin = runner.provenance("cpu", "a" * 40, False)
    rows = runner.rows_of(small(), {("reference", "both"): NUMBERS, ("reference", "forward"): NUMBERS}, 3, origin)
    runner.append(tmp_path / "cpu.jsonl", rows)
    newer = {("reference", "both"): {**NUMBERS, "floor_share": 0.25}}
    runner.append(tmp_path / "cpu.jsonl", runner.rows_of(small(), newer, 3, {**origin, "commit": "b" * 40}))
    text = write_results(tmp_path, tmp_path / "RESULTS.md").read_text()
    assert "Nothing here was run on a GPU" in text
    assert "| reference |  |  | 1.00 |  | 1.00 (0.90 to 1.10) | 25% | 3.0 | bbbbbbbbb |" in text
    growth = {("T=1", "both"): {**NUMBERS, "tokens": 7, "exponent": 1.04}}
    runner.append(
        tmp_path / "cpu.jsonl",
        [{**row, "case": "grows", "floor": ""} for row in runner.rows_of(small(), growth, 3, origin)],
    )
    text = write_results(tmp_path, tmp_path / "RESULTS.md").read_text()
    assert "### grows, float32\n\n3 rounds. Time grows as tokens^1.04.\n\n| candidate | tokens | no-grad |" in text
    assert "| T=1 | 7 |  |  |" in text
    runner.append(tmp_path / "cuda.jsonl", [{**rows[0], "device": "cuda", "device_name": "a GPU"}])
    text = write_results(tmp_path, tmp_path / "RESULTS.md").read_text()
    assert "Nothing here was run on a GPU" not in text and "## a GPU" in text
    with pytest.raises(UserError, match="no rows; run `python -m benchmarks run` first"):
        write_results(tmp_path / "none", tmp_path / "RESULTS.md")


def test_a_run_ends_with_a_line_per_case():
    def row(candidate: str, ratio: float, each: str = "both", **more: object) -> dict:
        return {"case": "op T=8", "candidate": candidate, "pass": each, "ratio": {"p50": ratio}, **more}

    rows = [row("reference", 1.0, peak_mib=10.4), row("ril_kernels", 0.5, floor_share=0.6, peak_mib=2.0)]
    rows += [row("ril_kernels", 0.1, "no-grad"), row("peer", 0.7), row("other peer", 0.8), row("floor", 0.3)]
    assert summary_rows(rows) == [("op T=8", "reference", "0.50", "0.70 peer", "60%", "2 of 10")]
    rows = [row("padded", 1.0, "no-grad"), row("shared", 0.25, "no-grad"), {**row("x", 1.0), "case": "none of ours"}]
    assert summary_rows(rows) == [("op T=8", "padded", "0.25", "", "", "")]
    print_summary(rows, console := Console(file=StringIO(), width=WIDTH))
    assert "op T=8 │ padded   │ 0.25" in console.file.getvalue()


def test_share_of_a_gpus_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    case = small()
    case.flops, case.num_bytes = {"both": 989 * 10**9}, 335 * 10**7
    assert runner._peak_share(case, "both", 0.01, "cuda") == {"flops": pytest.approx(0.1), "bytes": pytest.approx(0.1)}
    assert runner._peak_share(case, "both", 0.01, "cpu") is None


def test_a_changed_tree_is_noticed_but_not_its_results(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    for name in ("results/cpu.jsonl", "RESULTS.md", "PAPER.md", "paper.svg"):
        (tmp_path / "benchmarks" / name).write_text("")
    commit, dirty = runner.git_state(tmp_path)
    assert len(commit) == 40 and not dirty
    (tmp_path / "benchmarks" / "a.py").write_text("2")
    assert runner.git_state(tmp_path) == (commit, True)


@pytest.mark.parametrize(
    ("arguments", "state", "message"),
    [
        (["run"], ("a" * 40, True), "error: the working tree differs from its commit"),
        (
            ["run", "gpu-static"],
            ("a" * 40, False),
            "error: gpu-static: Triton is not installed here; `pip install",
        ),
        (
            ["run", "gpu-static", "--full"],
            ("a" * 40, False),
            "error: gpu-static reports all kernels, untimed: leave",
        ),
        (["run", "paper", "--jobs", "0"], ("a" * 40, False), "error: --jobs 0: expected 1 or more; 2 is usual"),
        (["run", "--rounds", "0"], ("a" * 40, False), "error: --rounds 0: expected 1 or more; 9 is usual"),
        (["run", "--case", "nobody"], ("a" * 40, False), "error: --case nobody: no such case; `python -m benchmarks"),
        (
            ["run", "nobody"],
            ("a" * 40, False),
            "error: nobody: no such op; expected one of: token_logprob, policy_loss",
        ),
        pytest.param(
            ["list", "--device", "cuda"],
            ("a" * 40, False),
            "error: --device cuda: no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_errors_are_one_line(arguments, state, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "all_cases", lambda device, full: [("token_logprob", "tiny", small)])
    monkeypatch.setattr(runner, "git_state", lambda root: state)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert command.main() == 2
    assert message in capsys.readouterr().err
