"""`python -m benchmarks list | run | report`; `run gpu-static` compiles the Triton kernels and times nothing."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import runner
from benchmarks.case import Case
from benchmarks.cases import OPS, all_cases
from benchmarks.report import KERNELS, PAPER, write_results
from benchmarks.summary import print_summary
from ril_engine.errors import UserError, exit_code

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 9
GPU_STATIC = "gpu-static"


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU here (torch.cuda.is_available() is False); leave it out for the CPU")
    return name


def _cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Built one at a time. Ops are wanted by name, cases and candidates by a part of theirs."""
    wanted = [op for op in arguments.op if op not in OPS]
    if wanted:
        raise UserError(f"{wanted[0]}: no such op; expected one of: {', '.join(OPS)}")
    found = False
    for op, about, build in all_cases(_device(arguments.device), arguments.full):
        if (not arguments.op or op in arguments.op) and all(part in f"{op} {about}" for part in arguments.case):
            case, found = build(), True
            wanted = {n: c for n, c in case.candidates.items() if any(part in n for part in arguments.candidate)}
            if arguments.candidate:
                case.candidates = {case.baseline: case.candidates[case.baseline], **wanted}
            yield case
    if not found:
        raise UserError(f"--case {' '.join(arguments.case)}: no such case; `python -m benchmarks list` names them")


def _list(arguments: argparse.Namespace) -> dict:
    found = {}
    for case in _cases(arguments):
        found[case.name] = list(case.candidates)
        print(f"{case.name}: {', '.join(case.candidates)}", file=sys.stderr)
    return {"cases": found}


def _origin(arguments: argparse.Namespace, device: str) -> dict:
    commit, dirty = runner.git_state(ROOT)
    if dirty and not (arguments.allow_dirty and arguments.output):
        raise UserError(
            "the working tree differs from its commit, so a row could not say what it measured; commit first, or try "
            "out with --allow-dirty --output FILE, beside the recorded rows"
        )
    return runner.provenance(device, commit, dirty)


def _run(arguments: argparse.Namespace) -> dict:
    if arguments.op == ["paper"]:
        return _paper(arguments)
    if arguments.op == [GPU_STATIC]:
        return _gpu_static(arguments)
    device = _device(arguments.device)
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: expected 1 or more; {ROUNDS} is usual")
    origin = _origin(arguments, device)
    output = arguments.output or RESULTS / f"{device}.jsonl"
    written, faults = [], []
    began = time.monotonic()
    for case in _cases(arguments):
        wrong = runner.wrong(case)
        for candidate, what in wrong.items():
            faults.append(f"{case.name}, {candidate}: {what}")
            print(f"WRONG {faults[-1]}; the case is not timed", file=sys.stderr, flush=True)
        if wrong:
            continue
        rounds = min(arguments.rounds, case.max_rounds or arguments.rounds)
        rows = runner.rows_of(case, runner.measure(case, device, rounds), rounds, origin)
        runner.append(output, rows)
        written += rows
        print(f"{case.name}, in {time.monotonic() - began:.0f} s", file=sys.stderr)
        began = time.monotonic()
        for row in rows:
            _print_row(row)
    print_summary(written)
    if faults:
        raise UserError(
            f"{len(faults)} wrong results, first: {faults[0]}; repair the candidate, times would mean nothing"
        )
    return {"rows": len(written), "output": str(output)}


def _paper(arguments: argparse.Namespace) -> dict:
    from benchmarks import paper

    origin = _origin(arguments, "cpu")
    output, seeds = arguments.output or RESULTS / PAPER, arguments.seeds or (2 if arguments.short else 3)
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expected 1 or more; 3 is usual")
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs}: expected 1 or more; 2 is usual")
    form = {"seeds": seeds, "short": arguments.short, "ablations": arguments.ablations, "jobs": arguments.jobs}
    rows = paper.study(output, arguments.work_dir, origin=origin, **form)
    folder = ROOT / "benchmarks" if output == RESULTS / PAPER else output.parent
    return {"rows": rows, "output": str(output), "tables": str(paper.write_tables(output, folder))}


def _print_row(row: dict) -> None:
    text = f"  {row['candidate']:<36} {row['pass']:<9} {row['ratio']['p50']:6.2f} x baseline"
    if "tokens" in row:
        text += f" {row['tokens']:6} tokens"
    if "floor_share" in row:
        text += f" {row['floor_share']:5.0%} of floor"
    if row.get("peak_share"):
        text += f", {row['peak_share']['flops']:.0%} of peak FLOP/s, {row['peak_share']['bytes']:.0%} of peak bytes/s"
    if "exponent" in row:
        text += f", time grows as tokens^{row['exponent']:.2f}"
    print(text, file=sys.stderr, flush=True)


def _gpu_static(arguments: argparse.Namespace) -> dict:
    if arguments.case or arguments.candidate or arguments.full or arguments.rounds != ROUNDS:
        raise UserError(
            f"{GPU_STATIC} reports all kernels, untimed: leave out --case, --candidate, --full and --rounds"
        )
    if find_spec("triton") is None:
        raise UserError(
            f"{GPU_STATIC}: Triton is not installed here; `pip install triton` brings the compiler, on Linux"
        )
    from benchmarks import gpu_static

    origin = _origin(arguments, "cpu")
    rows = list(gpu_static.rows({name: origin[name] for name in ("time", "commit", "dirty", "command", "versions")}))
    output = arguments.output or RESULTS / KERNELS
    output.unlink(missing_ok=True)  # a compiler repeats itself: the file is one commit's report, not a history
    runner.append(output, rows)
    return {"rows": len(rows), "output": str(output)}


def _report(_: argparse.Namespace) -> dict:
    return {"results": str(write_results(RESULTS, ROOT / "benchmarks" / "RESULTS.md"))}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of the kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    run = commands.add_parser("run", help="check, time and append rows to benchmarks/results/DEVICE.jsonl")
    run.add_argument("--rounds", type=int, default=ROUNDS)
    paper = run.add_argument_group("paper", "of `run paper`: the paper's comparison on the digits task (hours)")
    paper.add_argument("--short", action="store_true", help="two seeds, two methods, less training (minutes)")
    paper.add_argument("--seeds", type=int, help="default: 3, or 2 with --short")
    paper.add_argument("--ablations", action="store_true", help="those of RIL with both teachers, too")
    paper.add_argument("--jobs", type=int, default=2, help="runs at a time, which share the cores (default: 2)")
    paper.add_argument("--work-dir", type=Path, default=Path("runs/paper"))
    run.add_argument("--output", type=Path, help="another JSONL file")
    run.add_argument("--allow-dirty", action="store_true", help="measure an uncommitted tree; the rows say so")
    listing = commands.add_parser("list", help="cases and candidates")
    for each in (run, listing):
        each.add_argument("op", nargs="*", help=f"of {', '.join(OPS)}; default: all of them; or paper, or {GPU_STATIC}")
        each.add_argument(
            "--case", action="append", default=[], metavar="PART", help="only cases whose name holds PART"
        )
        each.add_argument(
            "--candidate", action="append", default=[], metavar="PART", help="only the baseline and these"
        )
        each.add_argument(
            "--full",
            action="store_true",
            help="the models' own H and V on a CPU too, and the large packs: gigabytes, an hour",
        )
        each.add_argument("--device", choices=("cpu", "cuda"), default=default)
    commands.add_parser("report", help="write benchmarks/RESULTS.md from the rows")
    arguments = parser.parse_args()
    action = {"run": _run, "list": _list, "report": _report}[arguments.command]
    return exit_code(lambda: action(arguments))


if __name__ == "__main__":
    sys.exit(main())
