"""What is kept of a run, and which of it is used when files are damaged or the disk is full."""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

from ril_engine import checkpoints, runlog
from ril_engine.config import DeepSpeedConfig
from ril_engine.engine import Engine
from ril_engine.errors import UserError

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


def test_a_full_disk_leaves_the_one_before(run_dir, engine):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # as a full disk, the write fails midway
    try:
        with pytest.raises(
            UserError,
            match=r"checkpoint .*step-000004: not written \(.*\); free some space; step-000003 is kept: go on with",
        ):
            checkpoints.save(run_dir, 4, {"student": engine}, BEFORE, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(run_dir) == ["step-000002", "step-000003"]
    assert checkpoints.newest_whole(run_dir).name == "step-000003"
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").touch()  # it cannot be written at all
    with pytest.raises(UserError, match=r"step-000004: not written \(.*\); .*; it would have been the first"):
        checkpoints.save(run_dir, 4, {"student": engine}, BEFORE, keep=1)


def test_another_number_of_ranks_is_refused(run_dir, engine):
    folder = checkpoints.newest_whole(run_dir)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"world_size": 3}))
    with pytest.raises(UserError, match=r"--resume .*: saved by 3 ranks, got 1; start as many"):
        checkpoints.load(folder, {"student": engine})
