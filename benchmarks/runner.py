"""Correctness first, then time: candidates of a case run in turn in one process, so that their ratios hold.

latency_ms    wall time of one call (CUDA: between two events), p20, p50, p80 over the rounds
ratio         a round's latency over the baseline's in the same round: p20, p50, p80 of those quotients, below 1 is
              faster. Only this may be compared between machines or days; a shared machine's milliseconds may not.
floor_share   p50 latency of the floor (bare GEMMs, or a copy of the bytes) over the candidate's: 1 cannot be beaten
peak_mib      most memory that one call allocates on top of its inputs, outputs included. CUDA: the allocator's peak.
              CPU: the running sum of the allocations that torch's profiler records; what C++ holds itself is not in it.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import BASELINE, Case

FLOOR = "floor"
# Error that every dtype is allowed on top of 3 times the baseline's, per unit of the largest true value (or of 1).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
WARM_UP_SECONDS, ROUND_SECONDS = 0.3, 0.01
PACKAGES = ("torch", "triton", "ril-engine", "liger-kernel", "transformers")


def wrong(case: Case) -> dict[str, str]:
    """Candidate -> what is wrong with its results; empty when all are right.

    The truth is the baseline in float64. A candidate's error may be 3 times the baseline's in the case's own dtype,
    plus a floor.
    """
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    truth = case.candidates[BASELINE](**exact)
    peer = case.candidates[BASELINE](**case.inputs)
    faults = {}
    for name, candidate in case.candidates.items():
        results = candidate(**case.inputs)
        labels = ("output", *(f"gradient of {each}" for each in case.grad))
        for label, got, usual, true in zip(labels, results, peer, truth, strict=True):
            if got.shape != true.shape:
                faults[name] = f"{label} has shape {tuple(got.shape)}, expected {tuple(true.shape)}"
                break
            error, own = (float((each.double() - true).abs().max()) for each in (got, usual))
            allowed = 3 * own + TOLERANCE[got.dtype] * max(1.0, float(true.abs().max()))
            if not error <= allowed:  # NaN is no number that is at most anything
                faults[name] = f"{label} is off by {error:.3g}, allowed {allowed:.3g}"
                break
    return faults


def _seconds(function, device: str, calls: int) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def _quantiles(values: list[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    p20, p50, p80 = tensor.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"p20": p20, "p50": p50, "p80": p80}


def measure(case: Case, device: str, rounds: int) -> dict[str, dict]:
    """Candidate (and "floor") -> its numbers. Each round runs all of them, starting with another one each time."""
    functions = {name: (lambda f=function: f(**case.inputs)) for name, function in case.candidates.items()}
    functions[FLOOR] = case.floor
    calls = {}
    for name, function in functions.items():
        count, began = 0, time.perf_counter()
        while count < 2 or time.perf_counter() - began < WARM_UP_SECONDS:
            function()
            count += 1
        once = _seconds(function, device, 1)
        calls[name] = max(1, math.ceil(ROUND_SECONDS / once))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(_seconds(functions[name], device, calls[name]))
    floor = _quantiles(seconds[FLOOR])["p50"]
    out = {}
    for name, values in seconds.items():
        latency = _quantiles([value * 1e3 for value in values])
        ratio = _quantiles([a / b for a, b in zip(values, seconds[BASELINE], strict=True)])
        share = floor * 1e3 / latency["p50"]
        out[name] = {"latency_ms": latency, "ratio": ratio, "floor_share": share}
        if name != FLOOR:
            out[name]["peak_mib"] = _peak_mib(functions[name], device)
    return out


def _peak_mib(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20


def git_state(root: Path) -> tuple[str, bool]:
    """The commit, and whether anything but benchmark results differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout

    results = [":(exclude)benchmarks/results", ":(exclude)benchmarks/RESULTS.md"]
    return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain", "--", ".", *results).strip())


def provenance(device: str, commit: str, dirty: bool) -> dict:
    """What a row says of where it comes from."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "device": device,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def rows_of(case: Case, numbers: dict[str, dict], rounds: int, origin: dict) -> list[dict]:
    """One row per candidate, as it is written to results/*.jsonl."""
    dtype = next(v.dtype for v in case.inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
    shared = {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "forward and backward" if case.grad else "forward",
        "floor": case.floor_name,
        "gemm_flops": case.flops,
        "bytes_moved": case.num_bytes,
        "rounds": rounds,
    }
    return [{"candidate": name, **shared, **values, **origin} for name, values in numbers.items()]


def append(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
