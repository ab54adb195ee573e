"""Checkpoints of a run and how it goes on from them.

RUN_DIR/checkpoints/step-000050/ holds what DeepSpeed keeps of each engine (parameters, optimiser, schedule), state.json
and, written last, manifest.json: size and SHA-256 of every file. All random numbers of the loop follow from the seed
and the step, so nothing else is needed. DeepSpeed reads its files with pickle: resume and export only from folders that
you trust.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from ril_engine.engine import Engine, write_universal
from ril_engine.errors import UserError, of_an_exchange
from ril_engine.runlog import warn
from ril_engine.stages import digest, on_rank_0, together

MANIFEST, STATE = "manifest.json", "state.json"


def require_unfinished(run_dir: Path) -> None:
    """Refuse what is no run, or one that has ended."""
    if not (run_dir / "config.yaml").exists():
        raise UserError(
            f"--resume {run_dir}: no config.yaml there; expected the folder of a run, runs/DATE-ALGORITHM-SEED"
        )
    if (run_dir / "result.json").exists():
        raise UserError(f"--resume {run_dir}: this run has ended, see its result.json; start a new one with --config")


def newest_whole(run_dir: Path) -> Path:
    """The newest checkpoint whose files are as its manifest says. All ranks call it, and each reads a share of them.

    Those after it are renamed to damaged-step-N, with a warning that names what is wrong.

    Raises:
        UserError: there is none, or none that is whole.
    """
    damaged: dict[Path, str] = {}
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        share = functools.partial(damage_of, folder, dist.get_rank(), dist.get_world_size())
        damage = [each for some in together(share) for each in some]
        if damage:
            damaged[folder] = damage[0]
            continue
        for other, what in damaged.items():
            warn(f"checkpoint {other.name}: {what}; {folder.name} is used, the other is now damaged-{other.name}")
            if dist.get_rank() == 0:
                aside = other.with_name(f"damaged-{other.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(other, aside)
        dist.barrier()
        return folder
    if not damaged:
        raise UserError(f"--resume {run_dir}: no checkpoint was saved (rl.save_every); start a new run with --config")
    wrong = "; ".join(f"{folder.name}: {what}" for folder, what in damaged.items())
    raise UserError(f"--resume {run_dir}: no checkpoint is whole ({wrong}); start a new run with --config")


def damage_of(folder: Path, rank: int = 0, world: int = 1) -> list[str]:
    """What is wrong with a rank's share of a checkpoint's files."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except OSError as error:
        return [f"{MANIFEST} cannot be read ({error.strerror})"]
    except ValueError:
        return [f"{MANIFEST} is not JSON"]
    wrong = []
    for name, (size, expected) in sorted(files.items())[rank::world]:
        path = folder / name
        if not path.exists():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != size:
            wrong.append(f"{name} has {path.stat().st_size} bytes, expected {size}")
        elif digest(path) != expected:
            wrong.append(f"{name} has been altered: another SHA-256 than in {MANIFEST}")
    return wrong


def _sync(path: Path) -> None:
    """Have a file or the names in a folder on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def best(run_dir: Path) -> tuple[Path, float] | None:
    """The checkpoint of the highest greedy accuracy on the validation questions, the first of several, and that
    accuracy; None where none has one."""
    found = []
    for folder in sorted((run_dir / "checkpoints").glob("step-*")):
        try:
            validation = json.loads((folder / STATE).read_text())["about"].get("validation")
        except (OSError, ValueError):  # damaged
            continue
        if validation is not None:
            found.append((folder, validation["greedy"]))
    return max(found, key=lambda each: each[1], default=None)


def save(run_dir: Path, step: int, engines: dict[str, Engine], about: dict, keep: int) -> None:
    """Keep the state after `step` steps, of those before the newest, `keep` in all, and the best. All ranks call it; a
    crash at any moment leaves those before it whole.

    Args:
        about: JSON that `load` gives back; `best` reads its "validation", of `evaluate`.
    Raises:
        UserError: it cannot be written, as on a full disk.
    """
    root = run_dir / "checkpoints"
    folder, partial = root / f"step-{step:06}", root / "partial"
    if folder.exists():  # resumed from it, and nothing has changed since then
        return
    dist.barrier()  # no rank looks for a folder that another one has begun to replace
    try:
        _write(partial, step, engines, about)
        if dist.get_rank() == 0:
            os.replace(partial, folder)
            _sync(root)
    except (OSError, RuntimeError) as error:  # torch.save names no errno
        if of_an_exchange(error) or isinstance(error, torch.OutOfMemoryError):  # no matter of the disk
            raise
        shutil.rmtree(partial, ignore_errors=True)
        others = sorted(path.name for path in root.glob("step-*"))
        kept = f"{others[-1]} is kept: go on with --resume {run_dir}" if others else "it would have been the first"
        why = str(error).splitlines()[0]
        raise UserError(f"checkpoint {folder}: not written ({why}); free some space; {kept}") from error
    dist.barrier()
    if dist.get_rank() == 0:
        leader = best(run_dir)
        for old in sorted(root.glob("step-*"))[:-keep]:
            if leader is None or old != leader[0]:
                shutil.rmtree(old)
    dist.barrier()


def _write(partial: Path, step: int, engines: dict[str, Engine], about: dict) -> None:
    """A checkpoint, all of it on the disk; each rank sees to a share of the files."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / STATE).write_text(json.dumps({"step": step, "world_size": world, "about": about}))
    dist.barrier()
    for name, engine in engines.items():
        engine.save(partial / name)
    dist.barrier()
    mine = sorted(path for path in partial.rglob("*") if path.is_file())[rank::world]
    for path in mine:
        _sync(path)
    shares: list = [None] * world
    dist.all_gather_object(
        shares, {str(path.relative_to(partial)): (path.stat().st_size, digest(path)) for path in mine}
    )
    if rank == 0:
        files = {name: about for share in shares for name, about in share.items()}
        (partial / MANIFEST).write_text(json.dumps(files, indent=1, sort_keys=True))
        for path in (partial / MANIFEST, *(path for path in partial.rglob("*") if path.is_dir()), partial):
            _sync(path)


def load(folder: Path, engines: dict[str, Engine]) -> tuple[int, dict]:
    """Bring the engines to a checkpoint; returns its step and what was saved about it. All ranks call it.

    Ranks may be more or fewer than those that saved it: rank 0 then rewrites it first for any number of them.
    """
    state = json.loads((folder / STATE).read_text())
    ranks, rewritten = state["world_size"], folder.with_name("rewritten")
    for name, engine in engines.items():
        if ranks == dist.get_world_size() or not engine.optimizer_is_divided:
            engine.load(folder / name)
            continue
        warn(f"checkpoint {folder.name}: saved by {ranks} ranks, rewritten for {dist.get_world_size()}")
        on_rank_0(functools.partial(_rewrite, folder / name, rewritten / name))
        engine.load(rewritten / name, universal=True)
        dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(rewritten, ignore_errors=True)
    return state["step"], state["about"]


def _rewrite(folder: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    try:
        write_universal(folder, out)
    except (OSError, RuntimeError) as error:  # torch.save names no errno
        shutil.rmtree(out.parent, ignore_errors=True)
        why = str(error).splitlines()[0]
        raise UserError(
            f"checkpoint {folder}: not rewritten for a job of {dist.get_world_size()} ({why}); free some space, or "
            "resume with as many ranks as before"
        ) from error
