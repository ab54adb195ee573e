"""The main job on a GPU, unchanged: skipped where there is none."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from ril_engine import tiny_models
from ril_engine.judge import INSTRUCTIONS
from tests.engine.jobs import SETTINGS, last_json, metrics, run

pytestmark = pytest.mark.gpu

REWARD = """
import torch

def last_digit(questions, references, responses, **columns):
    if torch.cuda.memory_allocated() < 2**20:
        raise RuntimeError("the models are not on a GPU")
    return [float(each[-1:].isdigit()) for each in responses]
"""


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """SFT on the saved responses, on the CPU, as one rank: the config file, and the result. It samples nothing, so that
    a GPU must find the same."""
    folder = tmp_path_factory.mktemp("job")
    config = folder / "config.yaml"
    config.write_text(SETTINGS.format(work_dir=folder / "runs"))
    return config, last_json(run("--config", config, "--set", "rl.algorithm=sft"))


def test_a_gpu_computes_what_a_cpu_does(on_cpu):
    config, want = on_cpu
    got = last_json(run("--config", config, "--set", "rl.algorithm=sft", gpu=True))
    for one, two in zip(metrics(got), metrics(want), strict=True):
        assert one == pytest.approx(two, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "gap"),  # the most that the sampler's log-probs may be off the trainer's, on average
    [
        ([], 1e-3),
        (["rl.packing=padded"], 1e-3),
        (["rl.lora={rank: 4}"], 1e-3),
        (["discriminator.use=fixed"], 1e-3),
        (["discriminator.objective=bradley_terry", "rl.micro_batch_tokens=300"], 1e-3),
        (["deepspeed={zero_stage: 2, bf16: true}"], 0.1),
        (["deepspeed={zero_stage: 1, bf16: true}", "rl.lora={rank: 4}", "rl.importance_cap=2"], 0.1),
    ],
    ids=str,
)
def test_the_job_runs_from_nothing_and_goes_on(on_cpu, tmp_path, monkeypatch, settings, gap):
    """With stages that the GPU builds where they are others than the CPU's."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "my_reward.py").write_text(REWARD)
    tiny_models.build(tmp_path / "judge", "tiny:judge", [INSTRUCTIONS["yes_no"], "yes no"], 0)
    rewards = "{kind: function, function: 'my_reward:last_digit'}, {kind: judge, path: " + str(tmp_path / "judge") + "}"
    settings = [f"answer_rewards=[{{kind: verifier}}, {rewards}]", "sampling.stop=[a, e, i, ' ', '1']", *settings]
    given = [part for each in settings for part in ("--set", each)]
    result = last_json(run("--config", on_cpu[0], *given, ranks=min(2, torch.cuda.device_count()), gpu=True))
    rows = metrics(result)
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["sampler/gap"] < gap and row["skipped/student"] == 0 < row["grad_norm/student"] for row in rows)
    stopped = tmp_path / "stopped"
    shutil.copytree(result["run_dir"], stopped)
    (stopped / "result.json").unlink()
    shutil.rmtree(stopped / "checkpoints" / "step-000002")
    resumed = last_json(run("--resume", stopped, ranks=min(2, torch.cuda.device_count()), gpu=True))
    assert metrics(resumed)[0] == rows[0] and len(metrics(resumed)) == 2
    assert json.loads((Path(resumed["run_dir"]) / "result.json").read_text())["steps"] == 2
