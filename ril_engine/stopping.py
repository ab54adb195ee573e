"""A run that is asked to stop: SIGTERM or SIGINT let it finish its step; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import AbstractContextManager
from time import monotonic

import torch
import torch.distributed as dist

from ril_engine.errors import bereft, rank

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ctrl-C or a batch system signals a whole job: a rank hears of it twice, by its launcher later where cores are few.
SAME_REQUEST_S = 3.0


class Stop(AbstractContextManager):
    """While entered, a signal asks for a stop, and one that comes more than SAME_REQUEST_S later ends the process.

    A thread reads signals as they come: Python's handlers run in the main thread, which may wait for another rank.
    """

    def __init__(self):
        self._asked: set[int] = set()
        self._agreed = False

    def __enter__(self) -> Stop:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = {each: signal.signal(each, lambda *_: None) for each in SIGNALS}
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # ends the thread

    def _watch(self) -> None:
        first = 0.0
        while numbers := os.read(self._read, 64):  # all that have come by now
            if not (asked := [each for each in SIGNALS if each in numbers]):
                continue
            if not self._asked:
                first = monotonic()
                if rank() == 0:
                    name = asked[0].name
                    print(f"{name}: the run stops after this step, another signal stops it at once", file=sys.stderr)
            self._asked.update(asked)
            # Once all have agreed, one that has ended may just be done. Of the rest, once one has died, DeepSpeed's
            # launcher sends SIGTERM to one after another and waits 30 s for each, which may be inside a collective
            # that never ends.
            if monotonic() - first > SAME_REQUEST_S or (not self._agreed and bereft()):
                os._exit(128 + asked[0])
        os.close(self._read)

    def agreed(self) -> str | None:
        """The name of the signal that any rank was sent. All ranks call it after the same step.

        SIGINT where they heard both: of Ctrl-C the launcher makes a SIGTERM, which a busy rank may take first.
        """
        asked = torch.tensor([int(each in self._asked) for each in SIGNALS])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self._agreed = bool(asked.any())
        return SIGNALS[int(asked.argmax())].name if self._agreed else None
