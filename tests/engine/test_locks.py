"""A lock between processes: refused, waited for, and free again when its holder is killed."""

import re
import subprocess
import sys
import threading

import pytest

from ril_engine import runlog, stages
from ril_engine.config import Config
from ril_engine.errors import UserError
from ril_engine.locks import held

HOLDER = """
import sys
from pathlib import Path
from ril_engine.locks import held
with held(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Hold a lock in another process, until its stdin is closed."""
    started = []

    def start(path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for each in started:
        each.kill()
        each.wait()
        each.stdout.close()


def test_a_held_lock_names_its_holder_and_ends_with_it(hold, tmp_path):
    def refuse(holder: str) -> None:
        raise UserError(holder)

    path = tmp_path / "new" / "lock"
    holder = hold(path)
    with pytest.raises(UserError, match=rf"^pid {holder.pid} on \S+$"), held(path, refuse):
        pass
    holder.kill()
    holder.wait()
    for _ in range(2):  # and it is let go of at the end
        with held(path, refuse):
            assert re.match(r"pid \d+ on ", path.read_text()) and str(holder.pid) not in path.read_text()


@pytest.mark.usefixtures("alone")
def test_a_stage_waits_for_the_job_that_builds_it(hold, tmp_path, monkeypatch, capfd):
    runlog.warn.cache_clear()
    config, built = Config.model_validate({"work_dir": tmp_path, "rl": {"algorithm": "grpo"}}), []
    holder = hold(tmp_path / "locks" / "thing-key")
    done = tmp_path / "stages" / "thing-key" / stages.DONE
    warned = stages.warn

    def end() -> None:
        done.parent.mkdir(parents=True)
        done.touch()
        holder.stdin.close()

    def warn(message: str) -> None:  # the other job ends its stage while this one waits
        warned(message)
        threading.Timer(0.2, end).start()

    monkeypatch.setattr(stages, "warn", warn)
    assert stages.stage(config, "thing", "key", built.append) == done.parent
    assert not built
    message = rf"warning: stage thing-key is being built by pid {holder.pid} on \S+: waiting for it"
    assert re.search(message, capfd.readouterr().err)
    done.unlink()
    stages.stage(config, "thing", "key", built.append)
    assert built and done.exists()
