"""Correctness first, then time: candidates of a case run in turn in one process, so that their ratios hold.

pass          no-grad: the op alone, nothing kept. both: forward and backward, timed together and each for itself
latency_ms    wall time of one call (CUDA: between two events), p20, p50, p80 over the rounds
ratio         a round's latency over the baseline's in the same round: p20, p50, p80 of those quotients, below 1 is
              faster. Only this may be compared between machines or days; a shared machine's milliseconds may not.
floor_share   the same for the floor's latency (bare GEMMs, or a copy of the bytes) over the candidate's, p50: 1 cannot
              be beaten
peak_mib      most memory that one call allocates on top of its inputs, outputs and gradients included. CUDA: the
              allocator's peak. CPU: the running sum of the allocations that torch's profiler records; what C++ holds
              itself is not in it.
cache_mib     keys and values that a rollout keeps
phase_share   of a rollout's time in prefill, decode, sampling and Python, on a CPU: on a GPU the host's clock sees no
              more than that a graph with a whole decode step was queued. Of a step's time in its phases; the host waits
              for a GPU where one begins and ends
tokens        positions that this candidate computes, where candidates differ in it
exponent      k where time is fitted by tokens^k over a case's candidates
peak_share    CUDA: GEMM FLOPs and bytes of the case per second over the device's peak, where PEAKS knows it
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import platform
import subprocess
import sys
import time
from collections import defaultdict
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.case import BACKWARD, BOTH, FORWARD, NO_GRAD, Case
from ril_kernels.token_logprob import memory

FLOOR = "floor"
# Error that every dtype is allowed on top of 3 times the baseline's, per unit of the largest true value (or of 1).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ROUND_SECONDS = 0.01  # a round repeats a call for at least so long
CONTENDER = 1.25  # a form of the floor that took so much longer than the fastest at first is not tried again
PACKAGES = ("torch", "triton", "ril-engine", "liger-kernel", "transformers", "trl", "cut-cross-entropy")
# Part of torch.cuda.get_device_name -> dense 16-bit FLOP/s, bytes/s, from NVIDIA's data sheets (SXM forms).
PEAKS = {
    "A100": (312e12, 2.04e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8.0e12),
}


def _leaves(case: Case, inputs: dict) -> dict:
    return {name: inputs[name].detach().requires_grad_() for name in case.grad}


def _results(case: Case, candidate, inputs: dict) -> list[Tensor]:
    """The output, or what the case's judge says of it, and the gradients of its sum."""
    leaves = _leaves(case, inputs)
    out = candidate(**{**inputs, **leaves})
    judged = out.detach() if case.judge is None else case.judge(out)
    return [judged, *(torch.autograd.grad(out.sum(), list(leaves.values())) if leaves else ())]


def wrong(case: Case) -> dict[str, str]:
    """Candidate -> what is wrong with its results; empty when all are right.

    The truth is the baseline in float64, or that the case's judge says 0. A candidate's error may be 3 times the
    baseline's in the case's own dtype, plus a floor.
    """
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    truth = [torch.zeros(())] if case.judge else _results(case, case.candidates[case.baseline], exact)
    usuals = _results(case, case.candidates[case.baseline], case.inputs)
    allowed = []
    for usual, true in zip(usuals, truth, strict=True):
        own = float((usual.double() - true).abs().max())
        tolerance = TOLERANCE[usual.dtype] if case.tolerance is None else case.tolerance
        allowed.append(3 * own + tolerance * max(1.0, float(true.abs().max())))
    labels = ("output", *(f"gradient of {each}" for each in case.grad))
    faults = {}
    for name, candidate in case.candidates.items():
        results = usuals if name == case.baseline else _results(case, candidate, case.inputs)
        for label, got, true, bound in zip(labels, results, truth, allowed, strict=True):
            if got.shape != true.shape:
                faults[name] = f"{label} has shape {tuple(got.shape)}, expected {tuple(true.shape)}"
                break
            error = float((got.double() - true).abs().max())
            if not error <= bound:  # NaN is no number that is at most anything
                faults[name] = f"{label} is off by {error:.3g}, allowed {bound:.3g}"
                break
    return faults


class _Clock:
    """Marks in the stream of work, and the seconds between them."""

    def __init__(self, device: str) -> None:
        self.cuda, self.marks = device == "cuda", []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append(event if self.cuda else time.perf_counter())

    def seconds(self) -> list[float]:
        if self.cuda:
            self.marks[-1].synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]


def _time_no_grad(case: Case, candidate, device: str, calls: int) -> dict[str, float]:
    clock = _Clock(device)
    with torch.no_grad():
        clock.mark()
        for _ in range(calls):
            candidate(**case.inputs)
        clock.mark()
    return {NO_GRAD: clock.seconds()[0] / calls}


def _time_training(case: Case, candidate, device: str, calls: int) -> dict[str, float]:
    clock, leaves = _Clock(device), _leaves(case, case.inputs)
    inputs, wanted, ones = {**case.inputs, **leaves}, list(leaves.values()), None
    for _ in range(calls):
        clock.mark()
        out = candidate(**inputs)
        clock.mark()
        ones = torch.ones_like(out) if ones is None else ones
        torch.autograd.grad(out, wanted, ones)
        clock.mark()
    seconds = clock.seconds()  # forward, backward, the gap to the next call, forward, ...
    forward, backward = sum(seconds[::3]) / calls, sum(seconds[1::3]) / calls
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def _time_floor(key: str, floor, device: str, calls: int) -> dict[str, float]:
    clock = _Clock(device)
    clock.mark()
    for _ in range(calls):
        floor()
    clock.mark()
    return {key: clock.seconds()[0] / calls}


def _fastest(forms: list, device: str):
    """The form of the floor that is fastest: the least of three calls, after one of each."""

    def seconds(form) -> float:
        return _time_floor("", form, device, 1)[""]

    if len(forms) == 1:
        return forms[0]
    best = {form: seconds(form) for form in forms}
    contenders = [form for form in forms if best[form] <= CONTENDER * min(best.values())]
    for form in contenders * 2:
        best[form] = min(best[form], seconds(form))
    return min(best, key=best.get)


def _quantiles(values: list[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    p20, p50, p80 = tensor.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"p20": p20, "p50": p50, "p80": p80}


def _quotients(above: list[float], below: list[float]) -> dict[str, float]:
    return _quantiles([a / b for a, b in zip(above, below, strict=True)])


def measure(case: Case, device: str, rounds: int) -> dict[tuple[str, str], dict]:
    """(candidate or "floor", pass) -> its numbers. Each round runs all, starting with another one each time."""
    _trim()
    timers = {}
    for name, candidate in case.candidates.items():
        if case.no_grad:
            timers[name, NO_GRAD] = partial(_time_no_grad, case, candidate, device)
        if case.grad:
            timers[name, BOTH] = partial(_time_training, case, candidate, device)
    for key, forms in case.floors.items():
        timers[FLOOR, key] = partial(_time_floor, key, _fastest(forms, device), device)
    calls = {}
    for key, timer in timers.items():
        timer(1)  # warm up: compilation, first pages
        calls[key] = max(1, math.ceil(ROUND_SECONDS / timer(1)[key[1]]))
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    order = list(timers)
    for turn in range(rounds):
        for key in order[turn % len(order) :] + order[: turn % len(order)]:
            for each, value in timers[key](calls[key]).items():
                seconds[key[0], each].append(value)
    out = {}
    for (name, each), values in seconds.items():
        row = out[name, each] = {"latency_ms": _quantiles([value * 1e3 for value in values])}
        row["ratio"] = _quotients(values, seconds[case.baseline, each])
        if (FLOOR, each) in seconds:
            row["floor_share"] = _quotients(seconds[FLOOR, each], values)["p50"]
            row["peak_share"] = _peak_share(case, each, row["latency_ms"]["p50"] / 1e3, device)
        row |= case.notes.get(name, {})  # of a timed call: the next is slowed by the profiler
        if name != FLOOR and each in (NO_GRAD, BOTH):
            row["peak_mib"] = peak_mib(partial(timers[name, each], 1), device)
        if name in case.tokens:
            row["tokens"] = case.tokens[name]
        if case.grows:
            row["exponent"] = _exponent(case.tokens, {n: seconds[n, each] for n in case.candidates})
    return out


def _trim() -> None:
    """Give free memory back, the C library's and our own, so that a case finds none of what earlier ones left: eager
    PyTorch was measured 2.1 times as fast where its tensors fitted in there as where each needed new pages."""
    gc.collect()
    memory.release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _exponent(tokens: dict[str, int], seconds: dict[str, list[float]]) -> float:
    """k of the line that fits log(median seconds) = k * log(tokens) + c."""
    pairs = [(tokens[name], _quantiles(values)["p50"]) for name, values in seconds.items()]
    x, y = torch.tensor(pairs, dtype=torch.float64).log().T
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def _peak_share(case: Case, each: str, seconds: float, device: str) -> dict[str, float] | None:
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    if peak is None:
        return None
    return {"flops": case.flops.get(each, 0) / seconds / peak[0], "bytes": case.num_bytes / seconds / peak[1]}


def peak_mib(function, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    memory.release()  # what the ops keep between calls counts as well
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

    results = [f":(exclude,glob)benchmarks/{each}" for each in ("results/**", "*.md", "*.svg")]
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


def rows_of(case: Case, numbers: dict[tuple[str, str], dict], rounds: int, origin: dict) -> list[dict]:
    """One row per candidate and pass, as it is written to results/*.jsonl."""
    dtypes = (v.dtype for v in case.inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
    dtype = next(dtypes, case.dtype)
    shared = {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "floor": case.floor_name,
        "bytes_moved": case.num_bytes,
        "rounds": rounds,
    }
    return [
        {"candidate": name, "pass": each, "gemm_flops": case.flops.get(each, 0), **shared, **values, **origin}
        for (name, each), values in numbers.items()
    ]


def append(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
