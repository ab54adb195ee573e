"""`--profile`: where the time and memory of a run's steps go: a trace of some of them, and a table of their phases."""

from __future__ import annotations

import gzip
import json
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ril_engine.runlog import PhaseTimer, show, warn

STEPS = 3  # after the first one, in which buffers are made and kernels compiled
OTHER = "other"  # of a step: logging, the exchange of responses, what no phase has
COLUMNS = ("phase", "seconds a step", "share", "tokens/s", "peak MiB")


class Profile(AbstractContextManager):
    """Watches some steps of one rank with torch's profiler, which makes them slower, more so those of many small ops.

    RUN_DIR/profile/trace.json.gz is a Chrome trace, for ui.perfetto.dev or chrome://tracing. phases.txt, also printed,
    says of each phase its seconds in a mean step, its share of the step, the step's response tokens per second of it,
    and the most memory of tensors at one time: on a GPU all of it, on a CPU what was allocated after the first step.
    """

    def __init__(self, run_dir: Path, timer: PhaseTimer, *, enabled: bool):
        self._folder, self._timer, self._enabled = run_dir / "profile", timer, enabled
        self._profiler, self._steps = None, []

    def step(self, seconds: dict[str, float], tokens: float) -> None:
        """Called after each step of the run, with its phases and its response tokens."""
        if not self._enabled:
            return
        if self._profiler is None:
            from torch.cuda import is_available
            from torch.profiler import ProfilerActivity, profile

            devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_available() else [])]
            self._profiler = profile(activities=devices, profile_memory=True)
            self._profiler.start()
            self._timer.pop()  # its start is no part of a step
        else:
            self._steps.append((seconds, tokens))
            if len(self._steps) == STEPS:
                self._finish()

    def _finish(self) -> None:
        self._enabled = False
        self._profiler.stop()
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / "trace.json.gz"
        self._profiler.export_chrome_trace(str(trace))
        self._profiler = None  # its events are large
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            table = phase_table(self._steps, json.load(file)["traceEvents"])
        show(table)
        show(f"profile: {self._folder}: trace.json.gz opens in ui.perfetto.dev")
        with (self._folder / "phases.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=100).print(table)
        self._timer.pop()  # no part of the next step either

    def __exit__(self, failed: type | None, *_) -> None:
        if failed or not self._enabled:
            return
        if self._steps:  # the run had fewer
            self._finish()
        else:
            warn("--profile: no step was watched, since the first one of a run is left out; raise rl.steps")


def phase_table(steps: list[tuple[dict[str, float], float]], events: list[dict]) -> Table:
    """The table of a profile, from (seconds per phase, response tokens) of its steps and the events of its trace."""
    names = list(dict.fromkeys(name for seconds, _ in steps for name in seconds if name != "step"))
    mean = {name: sum(seconds.get(name, 0.0) for seconds, _ in steps) / len(steps) for name in (*names, "step")}
    tokens, whole = sum(tokens for _, tokens in steps) / len(steps), mean.pop("step")
    mean[OTHER] = whole - sum(mean.values())
    peaks = peak_bytes(events, set(names))
    table = Table(title=f"A step, mean of {len(steps)} under the profiler", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == COLUMNS[0] else "right")
    rows = [(name, mean[name], peaks.get(name)) for name in (*names, OTHER)]
    rows.append(("step", whole, max(peaks.values(), default=None)))
    for name, seconds, peak in rows:
        shown = "-" if peak is None else f"{peak / 2**20:,.1f}"
        speed = f"{tokens / seconds:,.0f}" if seconds > 0 else "-"
        table.add_row(name, f"{seconds:.4f}", f"{seconds / whole:.1%}", speed, shown, end_section=name == OTHER)
    return table


def peak_bytes(events: list[dict], phases: set[str]) -> dict[str, int]:
    """The most bytes of tensors at one time within each phase, those that it found included, and within none of them.

    The profiler writes an event for each allocation and release, with the total after it; of a job with a GPU, only the
    GPU's count.
    """
    memory = [each for each in events if each.get("name") == "[memory]"]
    on_gpu = [each for each in memory if each["args"]["Device Type"] != 0]
    moments = [(each["ts"], 1, each["args"]["Total Allocated"]) for each in on_gpu or memory]
    for each in events:
        if each.get("cat") == "user_annotation" and each["name"] in phases:
            moments += [(each["ts"], 2, each["name"]), (each["ts"] + each["dur"], 0, None)]
    inside, total, peaks = [OTHER], 0, {}
    for _, kind, what in sorted(moments, key=lambda moment: moment[:2]):
        if kind == 0:
            inside.pop()
        elif kind == 1:
            total = what
        else:
            inside.append(what)
        peaks[inside[-1]] = max(peaks.get(inside[-1], 0), total)
    return peaks
