"""What is kept of a run, and which of it is used when files are damaged or the disk is full."""

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ril_engine import checkpoints, cli, runlog
from ril_engine.config import DeepSpeedConfig
from ril_engine.config_file import load_config
from ril_engine.engine import Engine, saved_weights
from ril_engine.errors import UserError, exit_code
from tests.engine.checkpoint_job import CASES, LEARNING_RATE, Job
from tests.engine.jobs import ROOT, launched

BEFORE = {"greedy": 0.5}


@pytest.fixture
def engine(alone):
    module = torch.nn.Linear(64, 64)
    return Engine(module, config=DeepSpeedConfig(), steps=10, learning_rate=0.1)


@pytest.fixture
def run_dir(engine, tmp_path) -> Path:
    """A run of three steps, the last two kept."""
    (tmp_path / "config.yaml").touch()
    for step in (1, 2, 3):
        update(engine)
        checkpoints.save(tmp_path, step, {"student": engine}, BEFORE, keep=2)
    return tmp_path


def update(engine: Engine) -> None:
    engine.backward(engine(torch.ones(1, 64)).square().sum(), last=True)
    engine.step()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_last_ones_are_kept_with_a_manifest(run_dir, engine):
    assert names(run_dir) == ["step-000002", "step-000003"]
    folder = checkpoints.newest_whole(run_dir)
    assert folder.name == "step-000003"
    files = json.loads((folder / "manifest.json").read_text())
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {*files, "manifest.json"} and "state.json" in files and len(files) >= 2
    weight = engine.module.weight.detach().clone()
    update(engine)
    assert checkpoints.load(folder, {"student": engine}) == (3, BEFORE) and engine.module.weight.equal(weight)


def weights_of(folder: Path) -> Path:
    return next((folder / "student" / "state").glob("*.pt"))


def truncate(folder: Path) -> None:
    with weights_of(folder).open("r+b") as file:
        file.truncate(1000)


def alter(folder: Path) -> None:
    with weights_of(folder).open("r+b") as file:
        file.seek(2000)
        byte = file.read(1)
        file.seek(2000)
        file.write(bytes([byte[0] ^ 1]))


def cut_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-20])


DAMAGE = {
    truncate: r"student/state/.*\.pt has 1000 bytes, expected \d{4,}",
    alter: r"student/state/.*\.pt has been altered: another SHA-256 than in manifest.json",
    lambda folder: weights_of(folder).unlink(): r"student/state/.*\.pt is missing",
    lambda folder: (folder / "state.json").write_text("{}"): r"state.json has 2 bytes, expected \d+",
    cut_manifest: "manifest.json is not JSON",
    lambda folder: (folder / "manifest.json").unlink(): r"manifest.json cannot be read \(No such file or directory\)",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_a_damaged_one_is_named_and_the_one_before_is_used(run_dir, engine, capfd, damage, message):
    runlog.warn.cache_clear()
    damage(run_dir / "checkpoints" / "step-000003")
    folder = checkpoints.newest_whole(run_dir)
    assert folder.name == "step-000002" and names(run_dir) == ["damaged-step-000003", "step-000002"]
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("warning"))
    assert re.match(f"warning: checkpoint step-000003: {message}; step-000002 is used, the other is now damaged-", line)
    assert checkpoints.load(folder, {"student": engine})[0] == 2
    update(engine)
    checkpoints.save(run_dir, 3, {"student": engine}, BEFORE, keep=2)  # in the place of the damaged one
    assert checkpoints.newest_whole(run_dir).name == "step-000003"
    damage(run_dir / "checkpoints" / "step-000002")
    damage(run_dir / "checkpoints" / "step-000003")
    with pytest.raises(UserError, match=f"no checkpoint is whole .step-000003: {message}; step-000002: {message}.; st"):
        checkpoints.newest_whole(run_dir)


@contextmanager
def full_disk() -> Iterator[None]:
    """As on one, a write fails midway."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_one_before(run_dir, engine):
    message = r"checkpoint .*step-000004: not written \(.*\); free some space; step-000003 is kept: go on with"
    with full_disk(), pytest.raises(UserError, match=message):
        checkpoints.save(run_dir, 4, {"student": engine}, BEFORE, keep=1)
    assert names(run_dir) == ["step-000002", "step-000003"]
    assert checkpoints.newest_whole(run_dir).name == "step-000003"
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").touch()  # it cannot be written at all
    with pytest.raises(UserError, match=r"step-000004: not written \(.*\); .*; it would have been the first"):
        checkpoints.save(run_dir, 4, {"student": engine}, BEFORE, keep=1)


def test_the_best_one_is_kept_besides(engine, tmp_path):
    for step, greedy in enumerate((0.5, None, 0.75, 0.75, 0.25, None), 1):
        about = {"validation": None if greedy is None else {"greedy": greedy, "sampled": 0.0}}
        checkpoints.save(tmp_path, step, {"student": engine}, about, keep=1)
    assert names(tmp_path) == ["step-000003", "step-000006"]
    assert checkpoints.best(tmp_path) == (tmp_path / "checkpoints" / "step-000003", 0.75)
    (tmp_path / "checkpoints" / "step-000003" / "state.json").write_text("{")
    assert checkpoints.best(tmp_path) is None


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    words = [*launched(2), "--no_local_rank", Path(__file__).parent / "checkpoint_job.py", folder]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def last(run_dir: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The weights after six updates of two ranks, and what the last three of them gave."""
    folder = run_dir / "checkpoints" / "step-000006"
    about = json.loads((folder / "state.json").read_text())["about"]
    return saved_weights(folder / "student"), about["seen"]


@pytest.mark.distributed
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", CASES)
def test_one_rank_goes_on_with_what_two_have_saved(two_ranks, tmp_path, capfd, case):
    """After three updates of the one the weights are where three more of the two would have taken them."""
    runlog.warn.cache_clear()
    run_dir, divided = two_ranks / case, case != "stage 0"
    expected, seen = last(run_dir)
    job = Job(two_ranks, load_config(run_dir / "config.yaml"))
    folder = run_dir / "checkpoints" / "step-000003"
    if divided:
        message = r"checkpoint .*student: not rewritten for a job of 1 \(.*\); free some space, or resume with as many"
        with full_disk(), pytest.raises(UserError, match=message):
            checkpoints.load(folder, {"student": job.engine})
    assert names(run_dir) == ["step-000003", "step-000006"]
    assert checkpoints.load(folder, {"student": job.engine})[0] == 3
    said = "warning: checkpoint step-000003: saved by 2 ranks, rewritten for 1" in capfd.readouterr().err
    assert said == divided  # without ZeRO the state is whole anyway
    for one, two in zip(job.update(3), seen, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    checkpoints.save(tmp_path, 6, {"student": job.engine}, {"seen": []}, keep=1)
    found, _ = last(tmp_path)
    assert found.keys() == expected.keys() and len(found) > 40
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 0.02 * LEARNING_RATE * 3, name
    assert names(run_dir) == ["step-000003", "step-000006"]


def exported(capfd, *arguments: str | Path) -> tuple[int, list[str], list[str]]:
    """Code, stdout and errors of `ril export`."""
    parsed = cli._parser().parse_args(["export", *map(str, arguments)])
    code = exit_code(lambda: cli._run(parsed))
    out, err = capfd.readouterr()
    return code, out.splitlines(), [line for line in err.splitlines() if line.startswith("error")]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_becomes_a_student_that_from_pretrained_loads(two_ranks, tmp_path, capfd, case):
    run_dir = two_ranks / case
    before = AutoModelForImageTextToText.from_pretrained(two_ranks / "model").state_dict()
    for which, step in (([], 6), (["--checkpoint", "best"], 3), (["--checkpoint", "step-6"], 6)):
        out = tmp_path / f"{len(which)}{step}"
        code, (line,), _ = exported(capfd, run_dir, *which, "--out", out)
        folder = run_dir / "checkpoints" / f"step-{step:06}"
        assert code == 0 and json.loads(line) == {"checkpoint": str(folder), "student": str(out)}
        AutoProcessor.from_pretrained(out)
        found = AutoModelForImageTextToText.from_pretrained(out).state_dict()
        saved = saved_weights(folder / "student")
        assert found.keys() == before.keys()
        kept = {name: value for name, value in found.items() if f"model.{name}" in saved}
        assert all(value.equal(saved[f"model.{name}"]) for name, value in kept.items())
        assert bool(kept) == (case != "adapters")  # these are merged, as test_main_job.py shows
        moved = {name for name, value in found.items() if not value.equal(before[name])}
        assert moved and not any("visual" in name for name in moved)


def test_what_cannot_be_exported_is_one_line(run_dir, tmp_path, capfd):
    out = tmp_path / "student"
    (run_dir / "config.yaml").write_text("rl: {algorithm: dr_grpo}")
    truncate(run_dir / "checkpoints" / "step-000003")
    cases = {
        (run_dir,): "checkpoint .*step-000003: student/state/.* has 1000 bytes, .*; choose another one by --checkpoint",
        (
            run_dir,
            "--checkpoint",
            "step-1",
        ): "--checkpoint step-1: no such one, expected step-N or best; .* has step",
        (
            run_dir,
            "--checkpoint",
            "last",
        ): "--checkpoint last: no such one, expected step-N or best; .* has step",
        (
            run_dir,
            "--checkpoint",
            "best",
        ): r"--checkpoint best: no accuracy was measured .*\(rl.evaluate_every\); ",
        (tmp_path / "none",): "run .*none: no config.yaml there; expected the folder of a run",
    }
    for words, message in cases.items():
        code, _, (line,) = exported(capfd, *words, "--out", out)
        assert code == 2 and re.match(f"error: {message}", line), line
        assert not out.exists()
    code, _, (line,) = exported(capfd, run_dir, "--out", run_dir)
    assert code == 2 and re.match("error: --out .*: it is there already; name a new folder", line)
