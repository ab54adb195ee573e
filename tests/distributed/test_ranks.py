"""Two ranks equal one rank with twice as many micro-batches, under each ZeRO stage and with what is on the host."""

import json
import math
import subprocess

import pytest
import torch

from ril_engine.lora import merged
from tests.distributed import ranks_job
from tests.distributed.ranks_job import BF16, LOSSES, OTHERS, RATE, STAGES, STEPS
from tests.engine.jobs import ROOT, launched

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory, alone):
    """What one rank found, in this process, and what two ranks found, by the name of a case."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks_job.prepare(folder)
    job, rows = ranks_job.make(folder), ranks_job.questions(folder)
    recorded = [job.rollout(step, rows[3 * (step % 3) :][:3]) for step in range(STEPS)]
    (folder / "recorded.json").write_text(json.dumps(recorded))
    one = ranks_job.train(job, recorded)
    one["untied"] = ranks_job.train(ranks_job.make(folder, "untied"), recorded[: ranks_job.FEW])
    adapted = ranks_job.make(folder, lora=ranks_job.LORA)
    one["adapters"] = ranks_job.train(adapted, recorded[: ranks_job.FEW])
    one["merged"] = merged(adapted.policy.model)
    one["taught"] = {name: ranks_job.taught(folder, name) for name in ("student", "untied")}
    words = [*launched(2), "--module", "tests.distributed.ranks_job", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return one, torch.load(folder / "two.pt", weights_only=False)


@pytest.mark.parametrize("case", [*STAGES, *OTHERS])
def test_two_ranks_equal_one(runs, case):
    assert len(runs[1][case]["seen"]) == (STEPS if case in STAGES else ranks_job.FEW)
    assert_same(runs[1][case], runs[0])


def test_a_head_of_its_own_is_sharded_and_gathered_too(runs):
    assert runs[0]["untied"]["gradients"].keys() - runs[0]["gradients"].keys() == {"student model.lm_head.weight"}
    assert_same(runs[1]["untied"], runs[0]["untied"])


def test_adapters_are_sharded_and_merged_too(runs):
    assert all(".lora_" in name or "discriminator" in name for name in runs[0]["adapters"]["gradients"])
    assert_same(runs[1]["adapters"], runs[0]["adapters"])
    one, two = runs[0]["merged"], runs[1]["merged"]
    assert one.keys() == two.keys()
    assert all((two[name] - weights).abs().max() < 0.02 * RATE * ranks_job.FEW for name, weights in one.items())


def assert_same(two: dict, one: dict) -> None:
    count = len(two["seen"])
    # The gradients of the first step, D's and the student's.
    assert two["gradients"].keys() == one["gradients"].keys() and len(one["gradients"]) > 50
    for name, gradient in one["gradients"].items():
        assert gradient.norm() > 0 or ".lora_A." in name  # an adapter begins as a product with zeros
        assert (two["gradients"][name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert two["seen"] == one["seen"][:count]  # tokens and rewards
    expected, got = (torch.tensor(each["curves"][:count]) for each in (one, two))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    losses = [LOSSES.index(name) for name in ("loss/policy", "loss/discriminator")]
    assert (got - expected)[:, losses].abs().max() < 1e-4 and expected.std(0).min() > 1e-4
    for name, weights in one["weights"][count].items():
        off = (two["weights"][count][name] - weights).abs().max()
        assert off < 0.02 * RATE * count, name
    assert (
        max((weights - one["weights"][0][name]).abs().max() for name, weights in one["weights"][count].items()) > RATE
    )


@pytest.mark.parametrize("case", [*STAGES, *OTHERS, *BF16])
def test_it_goes_on_with_responses_of_its_own(runs, case):
    live = runs[1][case]["live"]
    assert all(math.isfinite(value) for value in live.values())
    assert live["grad_norm/student"] > 0.1 and live["grad_norm/discriminator"] > 0.01
    # bfloat16 has eight bits: a probability of the sampler's and of the trainer's may differ by some per cent.
    assert live["sampler/gap"] < (0.1 if case in BF16 else 1e-4)
    assert live["skipped/student"] == live["skipped/discriminator"] == 0


def test_the_reference_is_in_the_dtype_of_the_student(runs):
    for case in BF16:
        assert runs[1][case]["dtypes"] == {"torch.bfloat16"}


def test_sft_of_rows_with_and_without_a_picture(runs):
    """Of five examples one rank has three, in two micro-batches, and the other two, in one."""
    for student in ("student", "untied"):
        one, two = runs[0]["taught"][student], runs[1]["taught"][student]
        assert one.keys() == two.keys()
        for name, weights in one.items():
            assert (two[name] - weights).abs().max() < 0.02 * RATE * ranks_job.FEW, name
