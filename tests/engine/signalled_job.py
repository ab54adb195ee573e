"""Run by test_survival.py through the launcher: a run of which one rank gets SIGTERM in one phase after another, and
which goes on each time. Rank 0 prints what each part of it returned, and how long that took from the signal on."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ril_engine.config_file import load_config
from ril_engine.engine import Engine, init_distributed
from ril_engine.errors import exit_code, leave
from ril_engine.rollout.engine import Rollout
from ril_engine.train import train

PHASES = {"prefill": (Rollout, "_prefill"), "decode": (Rollout, "step"), "backward": (Engine, "backward")}
PHASES["save"] = (Engine, "save")


@contextmanager
def signalled(phase: str, rank: int, sent: list[float]) -> Iterator[None]:
    """SIGTERM to this process in the first such phase of its loop, if it is this rank."""
    owner, name = PHASES[phase]
    original = getattr(owner, name)

    def send(*_) -> None:
        before_the_loop = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        if dist.get_rank() == rank and not before_the_loop and not sent:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    def method(self, *args, **kwargs):
        if phase == "backward":
            args[0].register_hook(send)  # runs inside of it
        else:
            send()
        return original(self, *args, **kwargs)

    setattr(owner, name, method)
    yield
    setattr(owner, name, original)


def main() -> dict:
    init_distributed()
    settings, run_dir = Path(sys.argv[1]), None
    for number, phase in enumerate(PHASES):
        sent: list[float] = []
        with signalled(phase, number % 2, sent):
            result = train(load_config(settings), run_dir)
        everyone: list = [None, None]
        dist.all_gather_object(everyone, [time.monotonic() - each for each in sent])
        if dist.get_rank() == 0:
            print(json.dumps({"phase": phase, "seconds": everyone, **result}), flush=True)
        run_dir = Path(result["run_dir"])
        settings = run_dir / "config.yaml"
    return train(load_config(settings), run_dir)


if __name__ == "__main__":
    sys.exit(leave(exit_code(main)))
