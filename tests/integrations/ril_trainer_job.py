"""RIL inside TRL: the README's RILTrainer takes a few steps on a tiny VLM; what it saw goes to FOLDER/rank-N.json."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ril_engine import digits
from ril_engine.config import Config
from ril_engine.engine import init_distributed
from tests.test_readme import python_blocks

TEACHER = ["It shows 1 and 2.", "Left 1, right 2.", "Left 1, right 2, so 3."]
STEPS = 12
seen: list[list[str]] = []


def digits_share(completions, **columns) -> list[float]:
    texts = [each[0]["content"] for each in completions]
    seen.append(texts)
    return [sum(c.isdigit() for c in each) / max(1, len(each)) for each in texts]


def main() -> None:
    folder = Path(sys.argv[1])
    student = folder / "student"
    d = {"learning_rate": 3e-4}
    config = Config(rl={"algorithm": "dr_grpo", "steps": STEPS}, student={"path": str(student)}, discriminator=d)
    init_distributed()
    pictures = torch.randint(0, 256, (8, 28, 56, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = {
        "prompt": [[{"role": "user", "content": question}] for question in [*digits.QUESTIONS.values()][:4] * 2],
        "image": [Image.fromarray(each.numpy()) for each in pictures],
        "teacher_responses": [[TEACHER[:2], TEACHER[2:]]] * 8,  # two teachers
    }
    settings = {
        "model": AutoModelForImageTextToText.from_pretrained(student),
        "processing_class": AutoProcessor.from_pretrained(student),
        "reward_funcs": digits_share,
        "train_dataset": Dataset.from_dict(rows),
    }
    usual = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 16,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    given = {"config": config, "folder_of_d": folder, "settings": settings, "usual": usual}
    for block in reversed(python_blocks("integrations.trl")):  # the trainer, then the two lines that speed it up
        exec(block, given)
    trainer = given["trainer"]
    trainer.train()
    module = trainer._adversary.module
    weights = [float(each.detach().double().sum()) for each in module.parameters()]
    with torch.no_grad():
        module.score.weight.zero_()
    trainer._load_optimizer_and_scheduler(str(folder / "out" / f"checkpoint-{STEPS}"))
    again = [float(each.detach().double().sum()) for each in module.parameters()]
    said = {"seen": seen, "history": trainer.state.log_history, "discriminator": weights, "loaded": again}
    (folder / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
