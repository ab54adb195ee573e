"""The recipes of configs/ for real models: what they set, and a run of one of each family with a tiny student."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from ril_engine import digits
from ril_engine.config import DigitsConfig
from ril_engine.config_file import load_config
from tests.engine import jobs

RECIPES = sorted(path for path in (jobs.ROOT / "configs").glob("*.yaml") if path.stem != "digits")
TINY = {"qwen2.5-vl-3b": "tiny:student", "internvl3-1b": "tiny:internvl_teacher"}  # of the same classes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_the_papers(path):
    config = load_config(path)
    rl, sampling, d = config.rl, config.sampling, config.discriminator
    assert (rl.algorithm, rl.group_size, rl.beta, rl.updates_per_step) == ("ril", 4, 0.01, 1)
    assert (rl.clip_low, rl.clip_high, rl.learning_rate, rl.final_learning_rate) == (0.2, 0.2, 1e-6, None)
    assert rl.steps * rl.questions_per_step == pytest.approx(40_000, rel=0.01)
    assert rl.questions_per_step % 8 == rl.questions_per_step % 6 == config.sft.batch_size % 8 == 0
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1, 0.95, 50, 1.05)
    assert (config.responses.per_question, d.learning_rate, d.similarity_levels) == (16, 1e-6, 2)
    for training in (config.sft, d.pretrain):
        assert (training.learning_rate, training.final_learning_rate) == (1e-5, 1e-6)
    (judge,) = config.answer_rewards
    served = [judge.server.model, *(each.server.model for each in config.teachers)]
    assert served == ["Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct", "OpenGVLab/InternVL3-78B"]
    assert config.deepspeed.bf16 and config.deepspeed.zero_stage == 3


def write_data(folder: Path) -> None:
    """Four questions as Parquet with their pictures inside, SFT rows as turns, and a test file."""
    folder.mkdir()
    sizes = DigitsConfig(train_questions=9, validation_questions=1, test_questions=9, sft_questions=9)
    digits.build(folder, sizes)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:4]]
    (folder / "train.jsonl").unlink()
    columns = {name: [row[name] for row in rows] for name in ("id", "question", "answer", "kind")}
    pictures = [{"bytes": (folder / row["image"]).read_bytes(), "path": None} for row in rows]
    parquet.write_table(pyarrow.table({**columns, "image": pictures}), folder / "train.parquet")
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "The answer is 7."},
    ]
    taught = [{"id": row["id"], "image": row["image"], "messages": turns} for row in rows]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in taught))


@pytest.mark.distributed
@pytest.mark.parametrize("name", TINY)
def test_a_recipe_runs_with_a_tiny_student(name, tmp_path, loopback):
    def behave(handler, seed, attempt):
        judged = "32B" in handler.body["model"]
        handler.complete("It agrees.\nScore: 1" if judged else f"The answer is {seed % 10}.")

    server = loopback(behave)
    text = (jobs.ROOT / "configs" / f"{name}.yaml").read_text()
    for host in ("teacher-a", "teacher-b", "judge"):
        assert f"http://{host}:8000/v1" in text
        text = text.replace(f"http://{host}:8000/v1", server.url)
    (tmp_path / "recipe.yaml").write_text(text)
    write_data(tmp_path / "data")
    sizes = ["sft.steps=1", "sft.batch_size=4", "discriminator.pretrain.steps=1", "discriminator.pretrain.batch_size=4"]
    sizes += ["discriminator.validation_share=0.5"]
    sizes += ["rl.steps=1", "rl.questions_per_step=2", "sampling.max_new_tokens=8", "evaluation.questions=2"]
    swaps = [f"data.dir={tmp_path / 'data'}", f"work_dir={tmp_path / 'runs'}", f"student.path={TINY[name]}", *sizes]
    done = jobs.run("--config", tmp_path / "recipe.yaml", *(word for each in swaps for word in ("--set", each)))
    result = jobs.last_json(done)
    (row,) = jobs.metrics(result)
    assert row["reward/answer/qwen72b"] == row["reward/answer/internvl78b"] == 1
    models = [body["model"] for body in server.bodies]
    assert [models.count(each) for each in ("Qwen/Qwen2.5-VL-72B-Instruct", "OpenGVLab/InternVL3-78B")] == [64, 64]
    first = next(body for body in server.bodies if "VL" in body["model"])["messages"][0]["content"]
    assert [part["type"] for part in first] == ["image_url", "text"]
