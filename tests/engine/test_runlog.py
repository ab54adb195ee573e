"""What a user sees while training, read back from real files, a real terminal and TensorBoard's own reader."""

import json
import math
import os
import sys
import time
from contextlib import contextmanager
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from ril_engine import runlog
from ril_engine.errors import UserError, exit_code
from ril_engine.runlog import PhaseTimer, RunLog, accuracy_table, progress

RIL = {
    "reward/student_answer": 0.52,
    "reward/student_similarity": 0.21,
    "reward/teacher_answer": 0.93,
    "reward/teacher_similarity": 0.81,
    "advantage/spread": 0.34,
    "kl": 0.0012,
    "discriminator/accuracy": 0.78,
    "length/student": 123.4,
    "tokens_per_second": 12345.0,
}
SECONDS = {"rollout": 12.0, "discriminator": 3.25, "score": 1.5, "reference": 2.0, "policy": 5.0, "step": 24.0}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_steps(run_dir, steps, value, **kwargs):
    with RunLog(run_dir, **kwargs) as log:
        for step in steps:
            log.step(step, {"kl": value}, {"step": 1.0})
            log.samples([{"step": step, "id": "a", "responses": [{"text": "\u2028é", "advantage": value}]}])


class Clock:
    """Stands for time.monotonic in runlog."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(runlog, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_step_is_on_disk_at_once_and_non_finite_is_null(tmp_path):
    with RunLog(tmp_path) as log:
        log.step(1, {"kl": float("nan"), "entropy": torch.tensor(0.5), "loss/policy": -float("inf")}, {"step": 2.0})
        log.samples([{"step": 1, "responses": [{"advantage": float("nan")}]}])
        metrics = {"kl": None, "entropy": 0.5, "loss/policy": None}
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "metrics": metrics, "seconds": {"step": 2.0}}]
        assert lines(tmp_path / "samples.jsonl") == [{"step": 1, "responses": [{"advantage": None}]}]


def test_resume_drops_later_lines_and_a_half_written_one(tmp_path):
    log_steps(tmp_path, range(1, 6), 1.0)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 6, "metr')
    log_steps(tmp_path, (4, 5), 2.0, resume_step=3)
    assert [(row["step"], row["metrics"]["kl"]) for row in lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
    ]
    samples = runlog.read_jsonl(tmp_path / "samples.jsonl")
    assert [(row["step"], row["responses"][0]["advantage"]) for row in samples] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
    ]
    assert samples[0]["responses"][0]["text"] == "\u2028é"
    assert not list(tmp_path.glob("*.tmp"))


def test_step_zero_starts_afresh(tmp_path):
    log_steps(tmp_path, (0, 1, 2), 1.0)
    log_steps(tmp_path, (0, 1), 2.0)
    assert [(row["step"], row["metrics"]["kl"]) for row in lines(tmp_path / "metrics.jsonl")] == [(0, 2.0), (1, 2.0)]


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is not JSON .*: remove it"):
        RunLog(tmp_path, resume_step=3)


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(tmp_path, range(1, 6), 1.0)
    time.sleep(1)  # files are in the order of the second that they are of
    log_steps(tmp_path, (4, 5), 2.0, resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["kl", "seconds/step"]
    assert [(e.step, e.value) for e in events.Scalars("kl")] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def test_console_line_goes_to_stderr_and_fits(tmp_path, capfd):
    with RunLog(tmp_path, total_steps=400) as log:
        log.step(12, RIL, SECONDS)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == (
        "step  12/400  ans 0.52  sim 0.21  teacher sim 0.81  adv 0.34  kl 1.2e-03  D acc 0.78  len 123.4"
        "  tok/s 12345  24.00s (rollout 12.00 disc 3.25 score 1.50 ref 2.00 policy 5.00)\n"
    )


def test_console_line_drops_what_is_absent(tmp_path, capfd):
    with RunLog(tmp_path) as log:
        log.step(3, {"reward/student_answer": 0.5, "kl": float("nan")}, {"step": 1.5})
    assert capfd.readouterr().err == "step 3  ans 0.50  kl nan  1.50s\n"


def test_phase_timer_accumulates_and_clears(clock):
    timer = PhaseTimer()
    for seconds in (2.0, 3.0):
        with timer.phase("rollout"):
            clock.now += seconds
    clock.now += 1.0
    with timer.phase("policy"):
        clock.now += 4.0
    assert timer.pop() == {"rollout": 5.0, "policy": 4.0, "step": 10.0}
    clock.now += 0.5
    assert timer.pop() == {"step": 0.5}


def test_a_phase_within_another_counts_in_itself_only(clock):
    timer = PhaseTimer()
    with timer.phase("policy"):
        clock.now += 1.0
        for seconds in (2.0, 3.0):
            with timer.phase("reference"):
                clock.now += seconds
                with timer.phase("gather"):
                    clock.now += 0.25
        clock.now += 4.0
    clock.now += 1.0
    assert timer.pop() == {"gather": 0.5, "reference": 5.0, "policy": 5.0, "step": 11.5}


def test_phase_timer_waits_for_cuda_only_when_it_is_in_use(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    timer = PhaseTimer()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with timer.phase("score"):
        pass
    assert calls == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with timer.phase("score"):
        calls.append("work")
    assert calls == ["synchronize", "work", "synchronize"]


def test_a_phase_is_a_range_of_nvtx(monkeypatch):
    """Whatever the device: Nsight Systems shows those of a CPU, too."""
    calls = []

    @contextmanager
    def annotate(name):
        calls.append(f"{name} begins")
        yield
        calls.append(f"{name} ends")

    monkeypatch.setattr(runlog, "annotate", annotate)
    with PhaseTimer().phase("rollout"):
        calls.append("work")
    assert calls == ["rollout begins", "work", "rollout ends"]


def test_updates_of_a_stage_that_are_left_out_are_counted(capsys):
    runlog.warn.cache_clear()
    skipped = runlog.Skipped("SFT student", 2)
    for step, norm in enumerate((1.0, math.nan, 0.5, math.inf), 1):
        skipped(step, norm)
    assert skipped.count == 2
    assert capsys.readouterr().err.splitlines() == [
        f"warning: SFT student: no update in step {step}, the loss or its gradient was not finite ({count} so far)"
        for step, count in ((2, 1), (4, 2))
    ]
    message = r"SFT student: 2 steps in a row \(rl.max_skipped_steps\), up to step 5, without an update, .*; lower its"
    with pytest.raises(UserError, match=message):
        skipped(5, -math.inf)


def test_plain_lines_at_most_every_ten_seconds_with_recent_eta(clock, capfd):
    with progress(100, "SFT", enabled=True) as advance:
        for _ in range(25):
            clock.now += 4.0
            advance(loss=0.51234)
        for _ in range(35):
            clock.now += 1.0
            advance(status="faster")
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "SFT: 3/100 (3%) 0:12 ETA 6:28 loss 0.512"
    assert err[1] == "SFT: 6/100 (6%) 0:24 ETA 6:16 loss 0.512"
    # The last 20 advances took a second each: the ETA no longer remembers the slow start.
    assert err[-2] == "SFT: 51/100 (51%) 2:06 ETA 0:49 faster"
    assert err[-1] == "SFT: 60/100 (60%) in 2:15"
    assert len(err) == 8 + 3 + 1


def test_eta_of_a_resumed_task_ignores_what_was_done_before(clock, capfd):
    with progress(100, "RIL", completed=90, enabled=True) as advance:
        clock.now += 20.0
        advance(5)
    assert capfd.readouterr().err.splitlines()[0] == "RIL: 95/100 (95%) 0:20 ETA 0:20"


def test_eta_counts_down_and_rises_in_a_stall(clock):
    pace = runlog._Pace(10, 0)
    assert pace.eta(clock.now) is None
    for _ in range(4):
        clock.now += 10.0
        pace.advance(1, clock.now)
    assert pace.eta(clock.now) == 60.0
    assert pace.eta(clock.now + 5) == 55.0
    assert pace.eta(clock.now + 50) > 60.0


def test_other_ranks_show_nothing(capfd):
    with progress(3, "SFT", enabled=False) as advance:
        advance()
        advance(2, status="x", loss=0.1)
    assert capfd.readouterr() == ("", "")


def on_terminal(monkeypatch, work) -> str:
    """What `work()` writes to a stderr that is a terminal."""
    master, slave = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        work()
        terminal.flush()
        monkeypatch.undo()
        text = os.read(master, 1 << 20).decode()
    os.close(master)
    return text


def test_step_lines_stay_whole_above_the_bar(tmp_path, monkeypatch):
    def work():
        with (
            RunLog(tmp_path, total_steps=2) as log,
            progress(2, "RIL [x]", enabled=True) as advance,
            progress(4, "rollout", enabled=True) as inner,
        ):
            inner(3)
            log.step(1, RIL, SECONDS)
            advance(1, status="[bold]judging")
            time.sleep(0.6)  # two frames of the bar

    text = on_terminal(monkeypatch, work)
    line = runlog.step_line(1, 2, RIL, SECONDS)
    assert f"{line}\r\n" in text or f"{line}\n" in text
    for part in ("RIL [x]", "rollout", "1/2", "3/4", "[bold]judging", "ETA", "━"):
        assert part in text
    assert runlog._live is None


def test_an_error_inside_a_bar_ends_it(monkeypatch):
    def work():
        with pytest.raises(ZeroDivisionError), progress(2, "RIL", enabled=True):
            raise ZeroDivisionError

    on_terminal(monkeypatch, work)
    assert runlog._live is None


def test_accuracy_table():
    before = {"greedy": 0.71, "sampled": 0.66, "questions": 2250, "mean_length": 5.2}
    before["by_kind"] = {
        "[b]sum": {"accuracy": 0.7, "questions": 250},
        "left": {"accuracy": 0.9996, "questions": 1000},
    }
    after = {"greedy": 0.86, "sampled": 0.655, "questions": 2250, "mean_length": 5.2}
    after["by_kind"] = {
        "[b]sum": {"accuracy": 0.952, "questions": 250},
        "left": {"accuracy": 0.9995, "questions": 1000},
        "new": {"accuracy": 0.5, "questions": 1},
    }
    out = StringIO()
    accuracy_table(before, after, console=Console(file=out, width=80))
    rows = [line.replace("│", " ").split() for line in out.getvalue().splitlines() if line.startswith("│")]
    assert rows == [
        ["[b]sum", "250", "70.0", "%", "->", "95.2", "%", "+25.2"],
        ["left", "1,000", "100.0", "%", "->", "100.0", "%", "+0.0"],
        ["new", "1", "-", "->", "50.0", "%", "-"],
        ["all", "(greedy)", "2,250", "71.0", "%", "->", "86.0", "%", "+15.0"],
        ["all", "(sampled)", "2,250", "66.0", "%", "->", "65.5", "%", "-0.5"],
    ]


def test_accuracy_table_goes_to_stderr(capfd):
    evaluation = {"greedy": 0.5, "sampled": 0.5, "questions": 2, "by_kind": {}, "mean_length": 1.0}
    accuracy_table(evaluation, evaluation)
    out, err = capfd.readouterr()
    assert out == "" and "all (sampled)" in err


def test_a_warning_comes_once_and_from_rank_0(capsys, monkeypatch):
    for _ in range(2):
        runlog.warn("test: no such thing")
    monkeypatch.setenv("RANK", "1")
    runlog.warn("test: of another rank")
    assert capsys.readouterr().err == "warning: test: no such thing\n"


def test_a_line_is_one_write(monkeypatch):
    """Ranks share stderr, and `python -u`, as DeepSpeed's launcher starts them, hands on each write as it is."""
    writes = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=writes.append, flush=lambda: None))
    runlog._print("step 1")

    def fails() -> dict:
        raise UserError("the judge is gone")

    assert exit_code(fails) == 2
    assert [each for each in writes if each] == ["step 1\n", "error: the judge is gone\n"]
