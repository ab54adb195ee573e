"""Run by test_soak.py: many steps of a micro-task in a process of its own, which looks at itself after each."""

import json
import sys
from pathlib import Path

import psutil

from ril_engine import train
from ril_engine.config_file import load_config
from ril_engine.errors import exit_code, leave
from ril_engine.runlog import RunLog


def main() -> dict:
    process, seen, step = psutil.Process(), [], RunLog.step

    def looked(self, *args) -> None:
        step(self, *args)
        seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))

    RunLog.step = looked
    result = train.train(load_config(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(seen))
    return result


if __name__ == "__main__":
    sys.exit(leave(exit_code(main)))
