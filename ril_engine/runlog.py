"""What a user sees while training: metrics.jsonl, TensorBoard; on stderr step lines, progress, the table."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import monotonic

from nvtx import annotate
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from ril_engine.errors import UserError, rank
from ril_engine.watch import Watch

Advance = Callable[..., None]  # (n=1, status="", **fields)
PLAIN_LINE_SECONDS = 10.0  # between progress lines where stderr is no terminal
PACE_ADVANCES = 20  # behind an ETA; those within a second of each other count as one

LINE_COLUMNS = (  # (label, metric, format) of the step line, in order
    ("ans", "reward/student_answer", ".2f"),
    ("sim", "reward/student_similarity", ".2f"),
    ("teacher sim", "reward/teacher_similarity", ".2f"),
    ("adv", "advantage/spread", ".2f"),
    ("kl", "kl", ".1e"),
    ("D acc", "discriminator/accuracy", ".2f"),
    ("len", "length/student", ".1f"),
    ("tok/s", "tokens_per_second", ".0f"),
)
SHORT_PHASES = {"discriminator": "disc", "reference": "ref"}

_live: Progress | None = None  # the bars on screen now; lines printed meanwhile go through their console


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; a last line cut short by a crash is left out, any other is refused."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON ({error.msg}): remove it") from error
    return rows


def _finite(value):
    """`value` with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json_line(row: dict) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def step_line(step: int, total: int | None, metrics: dict[str, float], seconds: dict[str, float]) -> str:
    """One step as one line; what a run does not measure is left out."""
    parts = [f"step {step}" if total is None else f"step {step:>{len(str(total))}}/{total}"]
    parts += [f"{label} {metrics[name]:{form}}" for label, name, form in LINE_COLUMNS if name in metrics]
    if "step" in seconds:
        parts.append(f"{seconds['step']:.2f}s")
    phases = [f"{SHORT_PHASES.get(name, name)} {seconds[name]:.2f}" for name in seconds if name != "step"]
    return "  ".join(parts) + (f" ({' '.join(phases)})" if phases else "")


def _print(line: str) -> None:
    if _live is None:
        print(f"{line}\n", end="", file=sys.stderr, flush=True)  # one write: other ranks write there, too
    else:
        _live.console.print(line, markup=False, highlight=False, soft_wrap=True)


def show(what: Table | str) -> None:
    """A table or a line on stderr, above the bars."""
    if isinstance(what, str):
        _print(what)
    else:
        (Console(stderr=True) if _live is None else _live.console).print(what)


@functools.cache
def warn(message: str) -> None:
    """A line on stderr, of rank 0 only; the same one is not repeated."""
    if rank() == 0:
        _print(f"warning: {message}")


class Skipped:
    """Counts the updates of a stage that are left out, since their loss or gradient is not finite."""

    def __init__(self, stage: str, limit: int):
        self._stage, self._limit = stage, limit
        self.count = self._in_a_row = 0

    def __call__(self, step: int, grad_norm: float) -> None:
        """Takes note of a step's update.

        Raises:
            UserError: it was the last of `limit` in a row, rl.max_skipped_steps, that were left out.
        """
        if math.isfinite(grad_norm):
            self._in_a_row = 0
            return
        self.count += 1
        self._in_a_row += 1
        warn(f"{self._stage}: no update in step {step}, the loss or its gradient was not finite ({self.count} so far)")
        if self._in_a_row == self._limit:
            raise UserError(
                f"{self._stage}: {self._limit} steps in a row (rl.max_skipped_steps), up to step {step}, without an "
                "update, whose loss or gradient was not finite; lower its learning rate or look at its data"
            )


class RunLog(AbstractContextManager):
    """metrics.jsonl, samples.jsonl, skipped.jsonl and tensorboard/ of one run, and a line on stderr per step.

    What is said of the discriminator's health is a second line, and the step's "warning" in metrics.jsonl.

    `resume_step` is the last step to keep: later lines, which a crashed run wrote after its last checkpoint,
    are dropped. 0 starts all of them afresh. `enabled=False`, for ranks other than 0, writes nothing.
    """

    def __init__(self, run_dir: Path, *, resume_step: int = 0, total_steps: int | None = None, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._total_steps, self._watch = total_steps, Watch()
        self._metrics = self._open(run_dir / "metrics.jsonl", resume_step)
        for row in read_jsonl(run_dir / "metrics.jsonl"):  # what was warned of before is not said again
            self._watch(row["metrics"])
        self._samples = self._open(run_dir / "samples.jsonl", resume_step)
        self._skipped = self._open(run_dir / "skipped.jsonl", resume_step)
        purge = resume_step + 1 if resume_step else 0  # TensorBoard hides this step and all later ones
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge, flush_secs=10)

    @staticmethod
    def _open(path: Path, resume_step: int):
        rows = read_jsonl(path) if resume_step and path.exists() else []
        kept = path.with_suffix(".tmp")
        kept.write_text("".join(_json_line(row) for row in rows if row["step"] <= resume_step))
        os.replace(kept, path)
        return path.open("a", buffering=1)

    def step(self, step: int, metrics: dict[str, float], seconds: dict[str, float]) -> None:
        if not self._enabled:
            return
        metrics = {name: float(value) for name, value in metrics.items()}
        seconds = {name: float(value) for name, value in seconds.items()}
        warning = self._watch(metrics)
        row = {"step": step, "metrics": metrics, "seconds": seconds}
        self._metrics.write(_json_line(row if warning is None else row | {"warning": warning}))
        for name, value in {**metrics, **{f"seconds/{phase}": s for phase, s in seconds.items()}}.items():
            self._tensorboard.add_scalar(name, value, step)
        _print(step_line(step, self._total_steps, metrics, seconds))
        if warning is not None:
            _print(f"warning: {warning}")

    def samples(self, rows: Iterable[dict]) -> None:
        if not self._enabled:
            return
        self._samples.write("".join(_json_line(row) for row in rows))

    def skipped(self, step: int, updates: list[str], questions: list[str]) -> None:
        """The ids of the questions of a step without an update of the student or of the discriminator."""
        warn(f"step {step}: no update of {' and '.join(updates)}, the loss or its gradient was not finite")
        if self._enabled:
            self._skipped.write(_json_line({"step": step, "updates": updates, "questions": questions}))

    def close(self) -> None:
        if not self._enabled:
            return
        for file in (self._metrics, self._samples, self._skipped, self._tensorboard):
            file.close()

    def __exit__(self, *_) -> None:
        self.close()


def _wait_for_gpu() -> None:
    """Have CUDA's queue empty, where CUDA is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class PhaseTimer:
    """Wall seconds per phase of a step; a phase within another one counts in itself only, CUDA work in the phase that
    queued it. Each is a range for Nsight Systems (NVTX) and for torch's profiler."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._inside: list[float] = []  # seconds of the phases within each one that is open
        self._popped = monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        from torch.profiler import record_function  # seconds to import

        _wait_for_gpu()
        start = monotonic()
        self._inside.append(0.0)
        with annotate(name), record_function(name):
            yield
            _wait_for_gpu()
        whole = monotonic() - start
        self._seconds[name] = self._seconds.get(name, 0.0) + whole - self._inside.pop()
        if self._inside:
            self._inside[-1] += whole

    def pop(self) -> dict[str, float]:
        """Seconds per phase since the last pop, and as "step" all that passed since then."""
        now = monotonic()
        seconds = {**self._seconds, "step": now - self._popped}
        self._seconds, self._popped = {}, now
        return seconds


class _Pace:
    """How far a task is, its recent speed, and the time left at that speed."""

    def __init__(self, total: int, completed: int):
        self.total, self.done, self.start = total, completed, monotonic()
        self._history = deque([(self.start, completed)], maxlen=PACE_ADVANCES + 1)  # (time, done), oldest first

    def advance(self, n: int, now: float) -> None:
        self.done += n
        if len(self._history) > 1 and now - self._history[-2][0] < 1.0:
            self._history.pop()
        self._history.append((now, self.done))

    def eta(self, now: float) -> float | None:
        """Seconds left; None before the first advance. Counts down between advances and rises in a stall."""
        history = list(self._history)
        (first, before), (last, done) = history[0], history[-1]
        if done == before:
            return None
        gap = (last - first) / (len(history) - 1)
        left = (self.total - done) * (max(last, now - gap) - first) / (done - before)
        return max(0.0, left - min(now - last, gap))

    def times(self, now: float) -> str:
        left = self.eta(now)
        return f"{clock(now - self.start)} ETA {'-:--' if left is None else clock(left)}"

    def count(self) -> str:
        return f"{self.done}/{self.total} ({100 * self.done // self.total if self.total else 100}%)"


class _TimeColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["pace"].times(monotonic()))


def _status(status: str, fields: dict) -> str:
    shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in fields.items()}
    return " ".join([status, *(f"{key} {value}" for key, value in shown.items())]).strip()


@contextmanager
def progress(total: int, description: str, *, completed: int = 0, enabled: bool) -> Iterator[Advance]:
    """Show how far a task is, on stderr; yields `advance(n=1, status="", **fields)`.

    A bar on a terminal (a task begun inside another one is a second bar), else a line every 10 seconds and
    one at its end. `enabled=False`, for ranks other than 0, shows nothing.
    """
    if not enabled:
        yield lambda *_, **__: None
        return
    pace, console = _Pace(total, completed), Console(stderr=True)
    if sys.stderr.isatty() and console.is_interactive:
        with _bar(pace, description, console) as advance:
            yield advance
        return
    printed = pace.start

    def advance(n: int = 1, status: str = "", **fields) -> None:
        nonlocal printed
        now = monotonic()
        pace.advance(n, now)
        if now - printed >= PLAIN_LINE_SECONDS and pace.done < pace.total:
            printed = now
            _print(f"{description}: {pace.count()} {pace.times(now)} {_status(status, fields)}".rstrip())

    try:
        yield advance
    finally:
        _print(f"{description}: {pace.count()} in {clock(monotonic() - pace.start)}")


@contextmanager
def _bar(pace: _Pace, description: str, console: Console) -> Iterator[Advance]:
    global _live
    outermost = _live is None
    if outermost:
        name = TextColumn("{task.description}", markup=False)
        status = TextColumn("{task.fields[status]}", markup=False)
        columns = (name, BarColumn(), MofNCompleteColumn(), _TimeColumn(), status)
        _live = Progress(*columns, console=console, refresh_per_second=4)
        _live.start()
    bars = _live
    task = bars.add_task(description, total=pace.total, completed=pace.done, pace=pace, status="")

    def advance(n: int = 1, status: str = "", **fields) -> None:
        pace.advance(n, monotonic())
        bars.update(task, advance=n, status=_status(status, fields))

    try:
        yield advance
    finally:
        if outermost:
            _live = None
            bars.stop()
        else:
            bars.remove_task(task)


def accuracy_rows(before: dict, after: dict) -> list[tuple[str, str, str, str, str]]:
    """Cells (label, questions, before, after, change in points): each question kind, then all together."""

    def cells(label: str, questions: int, old: float | None, new: float | None):
        change = "-" if None in (old, new) else f"{round(100 * (new - old), 1) + 0.0:+.1f}"
        return label, f"{questions:,}", *("-" if a is None else f"{100 * a:.1f} %" for a in (old, new)), change

    rows = []
    for kind in {**before["by_kind"], **after["by_kind"]}:
        old, new = before["by_kind"].get(kind, {}), after["by_kind"].get(kind, {})
        rows.append(cells(kind, (new or old)["questions"], old.get("accuracy"), new.get("accuracy")))
    for way in ("greedy", "sampled"):
        rows.append(cells(f"all ({way})", after["questions"], before.get(way), after.get(way)))
    return rows


def accuracy_table(before: dict, after: dict, console: Console | None = None) -> None:
    """Print accuracy before and after training, per question kind and over all (default console: stderr)."""
    table = Table(title="Accuracy on held-out questions (each kind: greedy)", title_justify="left")
    for name in ("question kind", "questions", "before", "after", "points"):
        table.add_column(name, justify="left" if name == "question kind" else "right")
    for index, (label, questions, old, new, change) in enumerate(rows := accuracy_rows(before, after), start=1):
        style = "" if change in ("-", "+0.0") else "green" if change[0] == "+" else "red"
        cells = (Text(label), questions, old, f"-> {new}", Text(change, style))
        table.add_row(*cells, end_section=index == len(rows) - 2)
    (console or Console(stderr=True)).print(table)
