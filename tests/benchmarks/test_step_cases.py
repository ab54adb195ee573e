"""Whole steps, small: what is compared takes the same questions, and has the same loss of the same roll-outs."""

import pytest
import torch

pytest.importorskip("trl", reason="TRL (extra `dev`, Python 3.11 or later) is not installed")
from benchmarks import step_cases, step_task
from benchmarks.runner import wrong
from ril_engine.errors import UserError

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SMALL = {"HIDDEN": 64, "LAYERS": 1, "VOCABULARY": 1024, "SAMPLES": 4, "LENGTH": 6}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(step_task, name, value)


@DTYPES
@pytest.mark.usefixtures("alone")
def test_rl_alone(dtype, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # a job of one that TRL must not join
    case = step_cases.rl_case(32, (2, 4), dtype, "cpu")
    assert wrong(case) == {} and case.dtype == dtype
    tokens = case.tokens
    rows, packed = 2 * 4, 2 * 32 + 2 * 4 * 5
    assert tokens[step_cases.RIL] == 3 * packed
    assert tokens[step_cases.TRL] == rows * (32 + 5) + 2 * rows * (32 + 6)  # generation, reference, policy
    # Advantages add up to 0 and the ratio is 1, so what is left of the loss is the KL.
    assert float(case.candidates[step_cases.RIL]()[0]) > 0.02
    for name, note in case.notes.items():
        assert sum(note["phase_share"].values()) == pytest.approx(1, abs=0.1), name


@DTYPES
@pytest.mark.usefixtures("alone")
def test_ril(dtype):
    case = step_cases.ril_case(32, (2, 4), dtype, "cpu")
    assert wrong(case) == {} and case.tokens[step_cases.RIL] < 0.6 * case.tokens[step_cases.PLAIN]
    plain, ours = (case.candidates[name]() for name in (step_cases.PLAIN, step_cases.RIL))
    torch.testing.assert_close(ours, plain, rtol=0, atol=step_task.TOLERANCE[dtype])
    assert bool((ours.abs() > 0.1).all())
    for note in case.notes.values():
        assert {"rollout", "discriminator", "reference", "policy"} <= set(note["phase_share"])


def test_another_device_than_the_engines_is_refused():
    with pytest.raises(UserError, match=r"--device cuda: DeepSpeed would run on cpu; set DS_ACCELERATOR=cuda"):
        step_cases.ril_case(32, (2, 4), torch.bfloat16, "cuda")
