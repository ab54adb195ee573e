"""`ril export`: the student of a checkpoint as a Hugging Face one, without ranks and without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch

from ril_engine import checkpoints
from ril_engine.config_file import load_config
from ril_engine.engine import saved_weights
from ril_engine.errors import UserError
from ril_engine.families import vision_tower
from ril_engine.lora import add_adapters, merged
from ril_engine.models import load
from ril_engine.policy import Policy


def export(run_dir: Path, which: str | None, out: Path) -> dict:
    """Write the student of a checkpoint to the new folder `out`; returns both.

    The checkpoint's files are checked, then read with pickle, which runs what they hold: only for runs that you trust.

    Args:
        which: "step-N", "best" by the validation questions, or None for the newest.
    Raises:
        UserError: no run, no such checkpoint, a damaged one, or a folder `out` that is there already.
    """
    if out.exists():
        raise UserError(f"--out {out}: it is there already; name a new folder")
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"run {run_dir}: no config.yaml there; expected the folder of a run, runs/DATE-ALGORITHM-SEED")
    folder = _chosen(run_dir, which)
    if damage := checkpoints.damage_of(folder):
        raise UserError(f"checkpoint {folder}: {damage[0]}; choose another one by --checkpoint")
    config = load_config(run_dir / "config.yaml")
    about = json.loads((folder / checkpoints.STATE).read_text())["about"]
    start = config.student.model_copy(update={"path": about["student"]})  # for all but the weights
    model, processor = load(start, torch.bfloat16 if config.deepspeed.bf16 else torch.float32)
    if config.rl.lora is not None:
        add_adapters(model, config.rl.lora, seed=0)
    if not config.rl.train_vision_tower:
        vision_tower(model).requires_grad_(False)
    # What is frozen may not be in a checkpoint, and is as it was at the start.
    policy = Policy(model)
    found = policy.load_state_dict(saved_weights(folder / "student"), strict=False)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    if wrong := sorted(trained & set(found.missing_keys)) + found.unexpected_keys:
        raise UserError(
            f"checkpoint {folder}: its weights are not those of {about['student']} (first: {wrong[0]}); give the run "
            "the student back that it began with"
        )
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=merged(model))
    processor.save_pretrained(partial)
    os.replace(partial, out)
    return {"checkpoint": str(folder), "student": str(out)}


def _chosen(run_dir: Path, which: str | None) -> Path:
    names = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    there = f"{run_dir} has {', '.join(names)}" if names else f"{run_dir} has none (rl.save_every)"
    name = names[-1] if names and which is None else None
    if which == "best":
        best = checkpoints.best(run_dir)
        if best is None:
            raise UserError(f"--checkpoint best: no accuracy was measured during this run (rl.evaluate_every); {there}")
        name = best[0].name
    elif which is not None and re.fullmatch(r"step-\d+", which):
        name = f"step-{int(which.removeprefix('step-')):06}"
    if name not in names:
        raise UserError(f"--checkpoint {which or ''}: no such one, expected step-N or best; {there}")
    return run_dir / "checkpoints" / name
