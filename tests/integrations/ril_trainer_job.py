"""RIL inside TRL: a few steps of `RILTrainer` on a tiny VLM; what it saw goes to FOLDER/rank-N.json."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer

from ril_engine import digits
from ril_engine.adversary import Adversary
from ril_engine.config import Config, DeepSpeedConfig
from ril_engine.discriminator import new_discriminator
from ril_engine.engine import Engine
from ril_engine.integrations.trl import RILMixin, use_fused_logprob

TEACHER = ["The left digit is 1, the right digit is 2.", "It shows 1 and 2.", "Left 1, right 2, so 3."]
STEPS = 12
seen: list[list[str]] = []


class RILTrainer(RILMixin, GRPOTrainer):
    pass


def digits_share(completions, **columns) -> list[float]:
    texts = [each[0]["content"] for each in completions]
    seen.append(texts)
    return [sum(c.isdigit() for c in each) / max(1, len(each)) for each in texts]


def main() -> None:
    folder = Path(sys.argv[1])
    student = folder / "student"
    config = Config(rl={"algorithm": "dr_grpo"}, student={"path": str(student)})
    torch.manual_seed(0)
    module, tokenizer = new_discriminator(config.student, config.rl.packing)
    engine = Engine(module, config=DeepSpeedConfig(), steps=STEPS, learning_rate=3e-4)
    adversary = Adversary(config, module, tokenizer, engine)
    pictures = torch.randint(0, 256, (8, 28, 56, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rows = {
        "prompt": [[{"role": "user", "content": question}] for question in [*digits.QUESTIONS.values()][:4] * 2],
        "image": [Image.fromarray(each.numpy()) for each in pictures],
        "teacher_responses": [TEACHER] * 8,
    }
    trainer = RILTrainer(
        model=AutoModelForImageTextToText.from_pretrained(student),
        processing_class=AutoProcessor.from_pretrained(student),
        reward_funcs=digits_share,
        adversary=adversary,
        args=GRPOConfig(
            output_dir=str(folder / "out"),
            use_cpu=True,
            bf16=False,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=16,
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=0.01,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict(rows),
    )
    use_fused_logprob(trainer)
    trainer.train()
    weights = [float(each.detach().double().sum()) for each in module.parameters()]
    said = {"seen": seen, "history": trainer.state.log_history, "discriminator": weights}
    (folder / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
