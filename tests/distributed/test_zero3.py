"""The fused ops inside a ZeRO-3 engine: two ranks, a real model, tied and untied heads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

DEEPSPEED = Path(sys.executable).parent / "deepspeed"


def test_gradients_equal_those_of_stage_0():
    job = [DEEPSPEED, "--num_accelerators", "2", "--master_port", "29713", Path(__file__).parent / "zero3_job.py"]
    done = subprocess.run(job, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    assert {(row["tied"], row["loss_kind"]) for row in results} == {
        (tied, kind) for tied in (True, False) for kind in ("policy_loss", "token_logprob")
    }
    for row in results:
        assert row["names"][0] == row["names"][1] > 50 and row["head"] > 1e-4
        assert row["losses"][1] == pytest.approx(row["losses"][0], rel=1e-6)
        assert row["worst"] < 1e-5, row
