"""tiny:judge: what it learns from, and the stage that trains it."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ril_engine import digits, tiny_judge
from ril_engine.config import Config, JudgeConfig, TrainingConfig
from ril_engine.errors import UserError
from ril_engine.judge import judge
from ril_engine.verifier import verify

ROOT = Path(__file__).parents[2]


def test_labels_are_the_verifiers_and_balanced():
    rows = tiny_judge.examples(random.Random(0), 60, commanded=0.0)
    right = [final == reference for _, reference, _, final in rows]
    assert right == [verify(response, reference) for _, reference, response, _ in rows]
    assert 0.5 <= sum(right) / len(rows) < 0.65  # some that are meant to be wrong are right by chance
    assert {question for question, *_ in rows} <= {
        text.format(n=n, m=m) for text in digits.QUESTIONS.values() for n in digits.NUMBERS for m in digits.NUMBERS
    }


def test_commands_say_nothing_about_the_label():
    """They come with right and with wrong responses alike, whatever they command."""
    commanded = tiny_judge.examples(random.Random(0), 300, commanded=1.0)
    claims = {word: [0, 0] for word in ("yes", "no", "right", "wrong", "judge", "accept")}
    for _, reference, response, final in commanded:
        right = final == reference
        for word, counts in claims.items():
            counts[right] += word in response.lower()
    for word, (wrong, right) in claims.items():
        assert wrong + right > 100 and 0.4 < right / (wrong + right) < 0.7, word


def config(tmp_path) -> Config:
    return Config.model_validate(
        {"work_dir": tmp_path / "runs", "teachers": [{"name": "a", "path": "tiny:qwen_teacher"}]}
    )


def settings(steps: int) -> TrainingConfig:
    return TrainingConfig(steps=steps, batch_size=16, learning_rate=3e-3, final_learning_rate=3e-3)


def test_other_checkpoints_stay_as_they_are(tmp_path):
    assert tiny_judge.judge_model(config(tmp_path), JudgeConfig(path="some/model")) == "some/model"
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("alone")
def test_the_stage_trains_once_and_the_judge_replies(tmp_path):
    first = tiny_judge.judge_model(config(tmp_path), JudgeConfig(path="tiny:judge"), settings(25))
    made = (Path(first) / "done.json").stat().st_mtime_ns
    local = judge(JudgeConfig(path=first))
    rows = [local.prompts.encode("What is the left digit?", "7", response) for response in ("7", "3")]
    with torch.no_grad():
        logits = torch.cat([local.model(torch.tensor([row])).logits[:, -1] for row in rows])
    assert logits.softmax(-1)[:, local.yes + local.no].sum(-1).min() > 0.8  # random weights: 0.02
    again = tiny_judge.judge_model(config(tmp_path), JudgeConfig(path="tiny:judge", weight=2.0), settings(25))
    assert again == first and (Path(first) / "done.json").stat().st_mtime_ns == made


RANK = """
import sys
from ril_engine import tiny_judge
from ril_engine.config import Config, JudgeConfig, TrainingConfig
from ril_engine.engine import init_distributed
init_distributed()
config, settings = Config.model_validate_json(sys.argv[1]), TrainingConfig.model_validate_json(sys.argv[2])
print(tiny_judge.judge_model(config, JudgeConfig(path="tiny:judge", micro_batch_tokens=300), settings))
"""


@pytest.mark.distributed
def test_two_ranks_equal_one(tmp_path):
    from transformers import AutoModelForCausalLM

    weights = []
    for world in (1, 2):
        arguments = [config(tmp_path / str(world)).model_dump_json(), settings(3).model_dump_json()]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ranks = []
        for rank in range(world):
            job = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
            environment = {**os.environ, **job, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment["PYTHONPATH"] = os.pathsep.join(sys.path)
            command = [sys.executable, "-c", RANK, *arguments]
            ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment))
        paths = {rank.communicate(timeout=300)[0].splitlines()[-1] for rank in ranks}
        assert [rank.returncode for rank in ranks] == [0] * world and len(paths) == 1
        weights.append(AutoModelForCausalLM.from_pretrained(paths.pop()).state_dict())
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=0, atol=0.02 * 3e-3 * 3)


def test_more_ranks_than_responses_are_refused(monkeypatch):
    monkeypatch.setattr(tiny_judge.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(tiny_judge.dist, "get_world_size", lambda: 17)
    with pytest.raises(UserError, match="learns from 16 responses a step, fewer than the 17 ranks; start fewer"):
        tiny_judge._train(Config(rl={"algorithm": "grpo"}), JudgeConfig(path="tiny:judge"), tiny_judge.TRAINING, None)
