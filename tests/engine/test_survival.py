"""Jobs that are killed, stopped by signals or lose a rank, through the real launcher. They also measure accuracy during
training and, of one rank, write a profile."""

import argparse
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ril_engine import cli
from ril_engine.errors import exit_code
from ril_engine.locks import held
from ril_engine.train import run as train
from tests.engine.jobs import ROOT, SETTINGS, command, last_json, launched, metrics, run

pytestmark = pytest.mark.distributed
STEPS = 6
Start = Callable[..., subprocess.Popen]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[int, dict]]:
    """The settings of a job, and the results of its uninterrupted runs by their number of ranks."""
    folder = tmp_path_factory.mktemp("job")
    config = folder / "config.yaml"
    looks = f"rl: {{steps: {STEPS}, evaluate_every: 2, evaluate_questions: 5"
    config.write_text(SETTINGS.format(work_dir=folder / "runs").replace("rl: {steps: 2", looks))
    two = last_json(run("--config", config, ranks=2))
    return config, {2: two, 1: last_json(run("--config", config, "--profile"))}


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
    assert result["evaluation"] == expected["evaluation"] and result["best"] == expected["best"]
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
    assert exit_code(lambda: train(argparse.Namespace(resume=run_dir, set=[], profile=False))) == 2
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
    stopped = re.findall(rf"{number.name}: stopped after step (\d+) of {STEPS}: --resume {run_dir} goes on", err)
    assert len(stopped) == 1, err
    (done,) = stopped
    assert (run_dir / "checkpoints" / f"step-{int(done):06}").exists()
    assert_same(last_json(run("--resume", run_dir, ranks=2)), results[2])


def test_a_signal_in_any_phase_ends_the_step_and_costs_nothing(whole):
    """Prefill, decode, backward and save: four stops, each followed by a resume."""
    config, results = whole
    words = [*launched(2), "--no_local_rank", Path(__file__).parent / "signalled_job.py", config]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    result = last_json(done)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"phase"')]
    expected = [("prefill", 1, 0), ("decode", 2, 1), ("backward", 3, 0), ("save", 4, 1)]
    assert [(row["phase"], row["steps"], row["seconds"].index([])) for row in rows] == [
        (phase, steps, 1 - rank) for phase, steps, rank in expected
    ]
    assert all(row["stopped"] == "SIGTERM" and max(map(sum, row["seconds"])) < 30 for row in rows)
    assert_same(result, results[2])


def test_a_run_measures_accuracy_as_it_goes_and_keeps_the_best(whole):
    for result in whole[1].values():
        run_dir, seen = Path(result["run_dir"]), metrics(result)
        looks = {i: row["validation/greedy"] for i, row in enumerate(seen, 1) if "validation/greedy" in row}
        assert list(looks) == [2, 4, 6] and all("validation/sampled" in seen[step - 1] for step in looks)
        best = max(looks, key=looks.get)  # the first of several
        assert result["best"] == {"checkpoint": f"step-{best:06}", "validation": looks[best]}
        kept = {path.name for path in (run_dir / "checkpoints").iterdir()}
        assert kept == {f"step-{step:06}" for step in (best, 5, 6)}
        assert "<b>Validation accuracy</b>" in Path(result["report"]).read_text()


def test_a_profile_shows_where_a_step_goes(whole):
    folder = Path(whole[1][1]["run_dir"]) / "profile"
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    phases = ["rollout", "judge", "discriminator", "reference", "policy"]
    found = Counter(each["name"] for each in events if each.get("cat") == "user_annotation")
    assert all(found[name] >= 3 for name in phases)
    rows = [re.split(r" *│ *", line.strip("│ \n")) for line in (folder / "phases.txt").read_text().splitlines()[4:-1]]
    table = {name: [float(value.strip("%").replace(",", "")) for value in values] for name, *values in rows if values}
    assert list(table) == [*phases, "other", "step"]
    seconds, shares, speeds, peaks = zip(*table.values(), strict=True)
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=1e-3) and min(seconds) >= 0
    assert sum(shares[:-1]) == pytest.approx(100, abs=1) and shares[-1] == 100
    rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()[1:4]]
    assert seconds[-1] == pytest.approx(sum(row["seconds"]["step"] for row in rows) / 3, abs=1e-3)
    assert speeds[-1] * seconds[-1] == pytest.approx(speeds[0] * seconds[0], rel=0.02)  # the step's tokens
    assert peaks[-1] == max(peaks) == max(peaks[:-1]) and peaks[2] > 1
    assert not (Path(whole[1][2]["run_dir"]) / "profile").exists()


@pytest.mark.usefixtures("alone")
def test_a_run_goes_on_with_another_number_of_ranks(whole, tmp_path, capfd):
    """ZeRO 2, whose optimiser is divided among the ranks: two until step 2, then one."""
    settings = ["--set", "deepspeed.zero_stage=2", "--set", "rl.keep_checkpoints=6"]
    expected = last_json(run("--config", whole[0], *settings, ranks=2))
    run_dir = tmp_path / "run"
    shutil.copytree(expected["run_dir"], run_dir)
    (run_dir / "result.json").unlink()
    for step in range(3, STEPS + 1):
        shutil.rmtree(run_dir / "checkpoints" / f"step-{step:06}")
    assert exit_code(lambda: train(argparse.Namespace(resume=run_dir, set=[], profile=False))) == 0
    out, err = capfd.readouterr()
    assert "warning: checkpoint step-000002: saved by 2 ranks, rewritten for 1" in err
    result = json.loads(out.splitlines()[-1])
    for one, two in zip(metrics(result), metrics(expected), strict=True):
        assert one["loss/policy"] == pytest.approx(two["loss/policy"], abs=1e-4)
        assert one["loss/discriminator"] == pytest.approx(two["loss/discriminator"], abs=1e-4)
        assert one["length/student"] == two["length/student"]
    one, two = (load_file(Path(each["student"]) / "model.safetensors") for each in (result, expected))
    updates = 2 * (STEPS - 2)
    assert all((one[name] - two[name]).abs().max() <= 0.02 * 1e-4 * updates for name in two)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("command", "section", "stage"),
    [("sft", "sft", "SFT student"), ("discriminator", "discriminator.pretrain", "D pre-training")],
)
def test_a_stage_without_updates_stops(whole, capfd, command, section, stage):
    """Once its first update has thrown the weights far away."""
    settings = (f"{section}.learning_rate=1e30", f"{section}.steps=6", "rl.max_skipped_steps=2")
    words = [command, "--config", str(whole[0]), *(part for each in settings for part in ("--set", each))]
    parsed = cli._parser().parse_args(words)
    assert exit_code(lambda: cli._run(parsed)) == 2
    err = capfd.readouterr().err
    for step in (2, 3):
        assert f"warning: {stage}: no update in step {step}, the loss or its gradient was not finite" in err
    assert re.search(rf"^error: {stage}: 2 steps in a row .*, up to step 3, without an update", err, re.M)


DEADLY = """
import os, sys, time

def reward(questions, references, responses, **columns):
    global calls
    calls = globals().get("calls", 0) + 1
    if calls == 2 and os.environ["RANK"] == "1":
        print(f"died at {time.time()}", flush=True)
        print("fatal: the GPU is gone", file=sys.stderr, flush=True)
        os._exit(9)
    return [0.5] * len(responses)
"""


def test_a_rank_that_dies_takes_the_job_with_it_and_has_the_word(whole, tmp_path, monkeypatch):
    """In step 2: Dr.GRPO scores no teacher before."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    settings = ["rl.algorithm=dr_grpo", "answer_rewards=[{kind: function, function: 'deadly:reward'}]"]
    done = run("--config", whole[0], *(part for each in settings for part in ("--set", each)), ranks=2)
    assert done.returncode == 9
    died = float(re.search(r"died at (\S+)", done.stdout)[1])
    assert time.time() - died < 60
    assert "step 1/6" in done.stderr and "step 2/6" not in done.stderr
    assert "fatal: the GPU is gone" in done.stderr and "Traceback" not in done.stderr  # of the rank that misses it


@pytest.mark.usefixtures("alone")
def test_steps_without_an_update_stop_the_run(whole, capfd):
    """A weight of the KL term that overflows once the policy has moved, in the first step's second update."""
    config, known = whole[0], runs(whole[0])
    settings = ["rl.beta=1e38", "rl.max_skipped_steps=2", "discriminator.similarity_levels=0"]
    assert exit_code(lambda: train(argparse.Namespace(resume=None, config=config, set=settings, profile=False))) == 2
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
