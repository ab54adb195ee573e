"""Checkpoints of a run and how it goes on from them.

RUN_DIR/checkpoints/step-000050/ holds what DeepSpeed keeps of each engine (parameters, optimiser, schedule) and
state.json. All random numbers of the loop follow from the seed and the step, so nothing else is needed. DeepSpeed
reads its files with pickle: resume only from folders that you trust.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist

from ril_engine.engine import Engine
from ril_engine.errors import UserError


def latest(run_dir: Path) -> Path:
    """The newest finished checkpoint of a run.

    Raises:
        UserError: there is no such run, it has ended, or it has no checkpoint.
    """
    if not (run_dir / "config.yaml").exists():
        raise UserError(
            f"--resume {run_dir}: no config.yaml there; expected the folder of a run, runs/DATE-ALGORITHM-SEED"
        )
    if (run_dir / "result.json").exists():
        raise UserError(f"--resume {run_dir}: this run has ended, see its result.json; start a new one with --config")
    found = sorted(path.parent for path in (run_dir / "checkpoints").glob("step-*/state.json"))
    if not found:
        raise UserError(f"--resume {run_dir}: no checkpoint was saved (rl.save_every); start a new run with --config")
    return found[-1]


def save(run_dir: Path, step: int, engines: dict[str, Engine], before: dict) -> None:
    """Keep the state after `step` steps, in place of the one before. All ranks call it; a crash leaves one whole."""
    root = run_dir / "checkpoints"
    folder, partial = root / f"step-{step:06}", root / "partial"
    if folder.exists():  # resumed from it, and nothing has changed since then
        return
    dist.barrier()  # no rank looks for a folder that another one has begun to replace
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    for name, engine in engines.items():
        engine.save(partial / name)
    dist.barrier()
    if dist.get_rank() == 0:
        state = {"step": step, "world_size": dist.get_world_size(), "before": before}
        (partial / "state.json").write_text(json.dumps(state))
        os.replace(partial, folder)
        for old in root.glob("step-*"):
            if old != folder:
                shutil.rmtree(old)
    dist.barrier()


def load(run_dir: Path, engines: dict[str, Engine]) -> tuple[int, dict]:
    """Bring the engines to the newest checkpoint; returns its step and the evaluation from before the run."""
    folder = latest(run_dir)
    state = json.loads((folder / "state.json").read_text())
    if state["world_size"] != dist.get_world_size():
        raise UserError(
            f"--resume {run_dir}: saved by {state['world_size']} ranks, got {dist.get_world_size()}; start as many"
        )
    for name, engine in engines.items():
        engine.load(folder / name)
    return state["step"], state["before"]
