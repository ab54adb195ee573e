"""What a user reads when something is wrong: one line on stderr and an exit code, never a stack trace."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PATIENCE_S = 10.0  # with a rank that may be about to end


class UserError(Exception):
    """Bad input or environment. The message says what, what was got, what was expected, and what to do."""


class OutsideError(UserError):
    """Something that a run calls has failed, such as a judge's server; the run's own state is good and worth saving."""


def require_free_disk(folder: Path, gib: float) -> None:
    """Refuse to begin what would end with half a file: not every library names a full disk when it meets one.

    Raises:
        UserError: less free than `gib`, or no folder that can be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = None if os.access(folder, os.W_OK) else "Permission denied"
    except OSError as error:
        why = error.strerror
    if why:
        raise UserError(f"work_dir {folder}: {why}; set it to a folder that can be made and written")
    free = shutil.disk_usage(folder).free / 2**30
    if free < gib:
        raise UserError(
            f"work_dir {folder}: no free disk, {free:.1f} GiB left, expected min_free_disk_gib {gib:g} or more; free "
            "some space or set work_dir elsewhere; finished stages and checkpoints are kept"
        )


def exit_code(job: Callable[[], dict]) -> int:
    """Run `job` and print its result as the last line of stdout, as JSON: 0. UserError or a full disk: one line, 2;
    Ctrl-C: one line, 130. A rank that only misses another one leaves what is shown to that one's own error: 1."""
    code = 2
    try:
        result = job()
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        message = f"no free disk{where} ({error.strerror}); free some space and start again: finished stages are kept"
    except RuntimeError as error:
        if not (of_an_exchange(error) and _bereft_soon()):
            raise
        return 1
    except KeyboardInterrupt:
        message, code = "stopped by SIGINT; finished stages and checkpoints are kept", 130
    else:
        if rank() == 0:
            print(json.dumps(result), flush=True)
        return 0
    if _first_to_tell():
        print(f"error: {message}\n", end="", file=sys.stderr, flush=True)  # one write: other ranks write there, too
    return code


def of_an_exchange(error: BaseException) -> bool:
    """Does it come of another rank, with which this one could not exchange?"""
    dist = _distributed()
    return dist is not None and (isinstance(error, dist.DistError) or "gloo" in str(error))


def _bereft_soon() -> bool:
    """The connection of a rank that dies ends before its process does."""
    end = time.monotonic() + PATIENCE_S
    while not bereft() and time.monotonic() < end:
        time.sleep(0.1)
    return bereft()


def bereft() -> bool:
    """Has another rank of this machine ended?"""
    if "LOCAL_SIZE" not in os.environ:  # no launcher
        return False
    ranks = psutil.Process(os.getppid()).children()
    return sum(each.status() != psutil.STATUS_ZOMBIE for each in ranks) < int(os.environ["LOCAL_SIZE"])


def leave(code: int) -> int:
    """Take leave of the other ranks after a success: DeepSpeed cannot start twice in a process, so this comes last.

    All leave together: a rank that left while rank 0 still wrote the report now and then died at exit.
    """
    if code == 0 and (dist := _distributed()) is not None:
        dist.barrier()
        dist.destroy_process_group()
    return code


def _distributed():
    """torch.distributed where this process has joined a job: errors of plain commands need no torch."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _first_to_tell() -> bool:
    """Before the ranks meet all of them fail alike, so rank 0 speaks; then only one of them may know."""
    dist = _distributed()
    if dist is None or dist.get_world_size() == 1:
        return rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("errors told", 1) == 1
    except RuntimeError:  # the store went with the rank that has told
        return False
