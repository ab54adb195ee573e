"""Jobs that are killed, stopped by signals or lose a rank, through the real launcher."""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ril_engine.errors import exit_code
from ril_engine.locks import held
from ril_engine.train import run as train
from tests.engine.jobs import ROOT, SETTINGS, command, last_json, metrics, run

pytestmark = pytest.mark.distributed
STEPS = 6
Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[int, dict]]:
    """The settings of a job, and the results of its uninterrupted runs by their number of ranks."""
    folder = tmp_path_factory.mktemp("job")
    config = folder / "config.yaml"
    config.write_text(SETTINGS.format(work_dir=folder / "runs").replace("rl: {steps: 2", f"rl: {{steps: {STEPS}"))
    return config, {ranks: last_json(run("--config", config, ranks=ranks)) for ranks in (2, 1)}


def runs(config: Path) -> set[Path]:
    return {path.parent for path in (config.parent / "runs").glob("*/config.yaml")}


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a job in a process group of its own; what is left of them ends with the test."""
    started = []

    def begin(*arguments: str | Path, ranks: int) -> subprocess.Popen:
        words, pipes = command(*arguments, ranks=ranks), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(words, cwd=ROOT, text=True, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for each in started:
        kill(each)


def new_run(config: Path, process: subprocess.Popen, known: set[Path], steps: int) -> Path | None:
    """The folder of the run that `process` makes, once it has taken so many steps; None if that has ended before."""
    while process.poll() is None:
        for path in runs(config) - known:
            if steps_of(path) >= steps:
                return path
        time.sleep(0.01)
    return None


def steps_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def changed(path: Path) -> int:
    """When a file or the names in a folder last changed, in nanoseconds; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def weights(result: dict) -> bytes:
    return (Path(result["student"]) / "model.safetensors").read_bytes()


def assert_same(result: dict, expected: dict) -> None:
    assert metrics(result) == metrics(expected) and len(metrics(expected)) == STEPS
    assert result["evaluation"] == expected["evaluation"]
    assert weights(result) == weights(expected)


def killed_and_resumed(
    start: Start, config: Path, ranks: int, kills: int, moments: random.Random
) -> tuple[dict, list[str]]:
    """The result of a run that is killed so often, at random moments in its loop, and what each kill met."""
    process, known, run_dir, met, began = start("--config", config, ranks=ranks), runs(config), None, [], 0
    for _ in range(kills):
        if run_dir is None:
            found = new_run(config, process, known, steps=1)
            assert found is not None, process.communicate()
            run_dir = found
            while process.poll() is None and not any((run_dir / "checkpoints").glob("step-*")):
                time.sleep(0.01)
        else:
            while process.poll() is None and changed(run_dir / "metrics.jsonl") < began:  # until it is in its loop
                time.sleep(0.01)
        time.sleep(moments.uniform(0, 3))
        kill(process)
        in_a_save = changed(run_dir / "checkpoints" / "partial") > began
        met.append(f"{steps_of(run_dir)} steps" + (", in a save" if in_a_save else ""))
        if (run_dir / "result.json").exists():
            break
        began = time.time_ns()
        process = start("--resume", run_dir, ranks=ranks)
    else:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
    return json.loads((run_dir / "result.json").read_text()), met


@pytest.mark.parametrize(("ranks", "kills"), [(2, 2), (1, 1)])
def test_a_killed_run_ends_as_the_whole_one(start, whole, ranks, kills):
    config, results = whole
    result, _ = killed_and_resumed(start, config, ranks, kills, random.Random(ranks))
    assert_same(result, results[ranks])


@pytest.mark.usefixtures("alone")
def test_sigterm_to_one_rank_ends_the_step_of_all(start, whole, capfd):
    config, results = whole
    known, process = runs(config), start("--config", config, ranks=2)
    run_dir = new_run(config, process, known, steps=1)
    holder = (run_dir / "lock").read_text().strip()
    os.killpg(process.pid, signal.SIGSTOP)  # so that it does not end meanwhile
    assert exit_code(lambda: train(argparse.Namespace(resume=run_dir, set=[]))) == 2
    assert f"error: run {run_dir}: in use by {holder}; let it end, or stop it by SIGTERM and" in capfd.readouterr().err
    os.killpg(process.pid, signal.SIGCONT)
    os.kill(int(re.match(r"pid (\d+) on ", holder)[1]), signal.SIGTERM)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    result = last_json(subprocess.CompletedProcess([], process.returncode, out, err))
    done = result["steps"]
    assert result == {"stopped": "SIGTERM", "steps": done, "run_dir": str(run_dir)} and 1 <= done < STEPS
    assert f"SIGTERM: stopped after step {done} of {STEPS}: --resume {run_dir} goes on" in err
    assert steps_of(run_dir) == done and (run_dir / "checkpoints" / f"step-{done:06}").exists()
    assert_same(last_json(run("--resume", run_dir, ranks=2)), results[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_job_is_one_to_each_rank(start, whole, number):
    """Ctrl-C. The launcher passes it on to ranks that have it, then exits with 1; DeepSpeed's command, at once."""
    config, results = whole
    known, process = runs(config), start("--config", config, ranks=2)
    run_dir = new_run(config, process, known, steps=1)
    os.killpg(process.pid, number)
    with held(run_dir / "lock", lambda holder: None):  # until rank 0 has ended
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    (done,) = re.findall(rf"{number.name}: stopped after step (\d+) of {STEPS}: --resume {run_dir} goes on", err)
    assert (run_dir / "checkpoints" / f"step-{int(done):06}").exists()
    assert_same(last_json(run("--resume", run_dir, ranks=2)), results[2])


DEADLY = """
import os, time

def reward(questions, references, responses, **columns):
    global calls
    calls = globals().get("calls", 0) + 1
    if calls == 2 and os.environ["RANK"] == "1":
        print(f"died at {time.time()}", flush=True)
        os._exit(9)
    return [0.5] * len(responses)
"""


def test_a_rank_that_dies_takes_the_job_with_it(whole, tmp_path, monkeypatch):
    """In step 2: Dr.GRPO scores no teacher before."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = ["rl.algorithm=dr_grpo", "answer_rewards=[{kind: function, function: 'deadly:reward'}]"]
    done = run("--config", whole[0], *(part for each in settings for part in ("--set", each)), ranks=2)
    assert done.returncode == 9
    died = float(re.search(r"died at (\S+)", done.stdout)[1])
    assert time.time() - died < 60
    assert "died at" in done.stdout and "step 1/6" in done.stderr and "step 2/6" not in done.stderr


@pytest.mark.usefixtures("alone")
def test_steps_without_an_update_stop_the_run(whole, capfd):
    """A weight of the KL term that overflows once the policy has moved, in the first step's second update."""
    config, known = whole[0], runs(whole[0])
    settings = ["rl.beta=1e38", "rl.max_skipped_steps=2", "discriminator.similarity_levels=0"]
    assert exit_code(lambda: train(argparse.Namespace(resume=None, config=config, set=settings))) == 2
    (run_dir,) = runs(config) - known
    err = capfd.readouterr().err
    assert "warning: step 1: no update of student, the loss or its gradient was not finite" in err
    message = (
        r"^error: 2 steps in a row \(rl.max_skipped_steps\) without an update of student, whose loss or gradient "
        rf"was not finite; their questions are in {run_dir}/skipped.jsonl; lower .*; --resume {run_dir} goes on after "
        "step 2$"
    )
    assert re.search(message, err, re.M)
    rows = [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["updates"]) for row in rows] == [(1, ["student"]), (2, ["student"])]
    train_file = next((config.parent / "runs" / "stages").glob("data-*/train.jsonl"))
    ids = {json.loads(line)["id"] for line in train_file.read_text().splitlines()}
    assert all(len(row["questions"]) == 4 and set(row["questions"]) <= ids for row in rows)
    seen = [json.loads(line)["metrics"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [each["skipped/student"] for each in seen] == [1.0, 2.0]
    assert (run_dir / "checkpoints" / "step-000002").exists()
