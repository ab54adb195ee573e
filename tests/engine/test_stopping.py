"""What signals do: one to a process inside an op, a second one, one through the launcher after a rank has died."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ril_engine.errors import exit_code
from ril_engine.stopping import SAME_REQUEST_S, SIGNALS, Stop
from tests.engine.jobs import launched

BUSY = """
import hashlib, os, sys, time
from ril_engine.stopping import Stop
with Stop():
    if os.environ.get("RANK") == "1":
        time.sleep(1)
        os._exit(9)
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, and Python's own handlers wait for it
"""


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop_and_its_echo_changes_nothing(number, capfd, monkeypatch):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert stop.agreed() is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes on what the whole job has got
        wait_for(stop.agreed)
        time.sleep(0.1)
        assert stop.agreed() == number.name
        monkeypatch.setenv("LOCAL_SIZE", "99")  # another rank has ended, since it was done; else this process would end
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == f"{number.name}: the run stops after this step, another signal stops it at once\n"


@pytest.mark.usefixtures("alone")
def test_ctrl_c_is_called_so_where_the_launchers_signal_is_taken_first():
    """Of two that wait, the handler of the higher number runs first."""
    with Stop() as stop:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for each in SIGNALS:
            signal.pthread_kill(threading.get_ident(), each)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        wait_for(stop.agreed)
        time.sleep(0.1)
        assert stop.agreed() == "SIGINT"


def test_a_second_signal_ends_the_process_inside_an_op():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME_REQUEST_S + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert process.stderr.read().startswith("SIGTERM: the run stops after this step")


@pytest.mark.distributed
def test_a_dead_rank_takes_one_that_waits_with_it(tmp_path):
    """The launcher alone would wait 30 s for each of the others."""
    (tmp_path / "busy.py").write_text(BUSY)
    process = subprocess.Popen(
        [*launched(2), "--no_local_rank", tmp_path / "busy.py"], stdout=subprocess.PIPE, text=True
    )
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None
    began = time.monotonic()
    assert process.wait(timeout=120) == 9
    assert time.monotonic() - began < 25


def test_ctrl_c_before_the_loop_is_one_line(capfd):
    def interrupted() -> dict:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130
    assert capfd.readouterr().err == "error: stopped by SIGINT; finished stages and checkpoints are kept\n"
