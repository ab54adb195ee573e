"""Run by test_checkpoints.py through the launcher: for each ZeRO stage, and for adapters, a run's folder with a
checkpoint of two ranks after three updates, and one after three more."""

import json
import sys
import typing
from pathlib import Path

import torch.distributed as dist
import yaml

from ril_engine import checkpoints, digits, tiny_models
from ril_engine.config import Config, DeepSpeedConfig, DigitsConfig, ModelConfig
from ril_engine.config_file import load_config
from ril_engine.engine import Engine, init_distributed
from ril_engine.lora import add_adapters
from ril_engine.models import Encoder, load
from ril_engine.policy import Policy

STAGES = typing.get_args(DeepSpeedConfig.model_fields["zero_stage"].annotation)
CASES = {f"stage {stage}": {"deepspeed": {"zero_stage": stage}} for stage in STAGES}
CASES["adapters"] = {"deepspeed": {"zero_stage": 2}, "rl": {"lora": {"rank": 4}}}
RESPONSES = ("7", "I see 7 and 8. The answer is 56.", "so it is odd.", "The answer is 3.")
LEARNING_RATE = 1e-3


class Job:
    """A student that learns four responses, divided among the ranks."""

    def __init__(self, folder: Path, config: Config):
        self.model, processor = load(ModelConfig(path=str(folder / "model")))
        self.model.model.visual.requires_grad_(False)
        if config.rl.lora is not None:
            add_adapters(self.model, config.rl.lora, seed=0)
        rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
        encoder = Encoder(self.model, processor, folder / "data", 10_000)
        mine = slice(dist.get_rank(), len(RESPONSES), dist.get_world_size())
        responses = [encoder.response(text) for text in RESPONSES]
        self.tokens = sum(map(len, responses))
        self.batch = encoder.batch(rows[: len(RESPONSES)][mine], responses[mine])
        settings = {"steps": 6, "learning_rate": LEARNING_RATE, "final_learning_rate": LEARNING_RATE / 2}
        settings["save_frozen"] = config.rl.lora is None
        self.engine = Engine(Policy(self.model), config=config.deepspeed, **settings)

    def update(self, count: int) -> list[dict[str, float]]:
        seen = []
        for _ in range(count):
            self.engine.backward(-self.engine(self.batch).sum() / self.tokens, last=True)
            seen.append(self.engine.step())
        return seen


def main() -> None:
    init_distributed()
    folder = Path(sys.argv[1])
    if dist.get_rank() == 0:
        sizes = DigitsConfig(train_questions=9, validation_questions=1, test_questions=1, sft_questions=1)
        (folder / "data").mkdir()
        (folder / "model").mkdir()
        digits.build(folder / "data", sizes)
        tiny_models.build(folder / "model", "tiny:student", [], seed=0)
    dist.barrier()
    for name, settings in CASES.items():
        run_dir = folder / name
        if dist.get_rank() == 0:
            run_dir.mkdir()
            settings = settings | {"rl": {"algorithm": "dr_grpo", **settings.get("rl", {})}}
            (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
        dist.barrier()
        job = Job(folder, load_config(run_dir / "config.yaml"))
        for step in (3, 6):
            seen = job.update(3)
            about = {"student": str(folder / "model"), "validation": {"greedy": 1 / step}, "seen": seen}
            checkpoints.save(run_dir, step, {"student": job.engine}, about, keep=2)


if __name__ == "__main__":
    main()
