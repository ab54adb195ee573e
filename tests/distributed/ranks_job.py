"""Run by test_ranks.py through the DeepSpeed launcher, and in its own process for one rank: the same steps of
Algorithm 2 under each ZeRO stage."""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from ril_engine import adversary, digits, loop, tiny_models
from ril_engine.adversary import WEIGHTS
from ril_engine.config import Config, ModelConfig, TrainingConfig
from ril_engine.discriminator import new_discriminator
from ril_engine.engine import init_distributed
from ril_engine.loop import Loop, average
from ril_engine.lora import merged
from ril_engine.models import load
from ril_engine.packing import micro_batches
from ril_engine.runlog import PhaseTimer
from ril_engine.stages import train_supervised

STEPS, FEW, RATE = 10, 3, 1e-3
LOSSES = ("loss/policy", "loss/discriminator", "kl", "grad_norm/student", "grad_norm/discriminator")


def prepare(folder: Path) -> None:
    """A student, one whose head is not its embeddings, questions, and a D as it was initialised, but for its score."""
    from safetensors.torch import save_file

    sizes = Config.model_validate(settings(folder)).data.digits
    for name in ("student", "data", "d"):
        (folder / name).mkdir()
    tiny_models.build(folder / "student", "tiny:student", ["Tell who wrote the response"], 0)
    digits.build(folder / "data", sizes)
    model, processor = load(ModelConfig(path=str(folder / "student")))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(folder / "untied")
    processor.save_pretrained(folder / "untied")
    module, _ = new_discriminator(ModelConfig(path=str(folder / "student")))
    torch.nn.init.normal_(module.score.weight, generator=torch.Generator().manual_seed(0))  # or only it has a gradient
    save_file({name: value.clone() for name, value in module.state_dict().items()}, folder / "d" / WEIGHTS)


def settings(folder: Path, **deepspeed) -> dict:
    return {
        "work_dir": folder / "runs",
        "teachers": [{"name": "a", "path": "tiny:qwen_teacher"}, {"name": "b", "path": "tiny:internvl_teacher"}],
        "sampling": {"max_new_tokens": 6},
        "rl": {
            "steps": STEPS + 2,
            "questions_per_step": 3,
            "learning_rate": RATE,
            "beta": 0.1,
            "micro_batch_tokens": 400,
        },
        "discriminator": {"learning_rate": RATE},
        "data": {"digits": {"train_questions": 9, "validation_questions": 1, "test_questions": 1, "sft_questions": 5}},
        "deepspeed": deepspeed,
    }


def questions(folder: Path) -> list[tuple[int, dict]]:
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    return [(i, {**row, "image": row["image"] if i % 3 else None}) for i, row in enumerate(rows)]


def make(folder: Path, student: str = "student", lora: dict | None = None, **deepspeed) -> Loop:
    tree = settings(folder, **deepspeed)
    config = Config.model_validate({**tree, "rl": {**tree["rl"], "lora": lora}})
    saved: dict = {}
    for name, style in (("a", "sentences"), ("b", "clauses")):
        for _, row in questions(folder):
            text = digits.reasoned_answer(row["kind"], *row["digits"], *row["numbers"], style)
            record = {"source": name, "text": text, "truncated": False, "answer_reward": 1.0}
            saved.setdefault(name, {})[row["id"]] = [record] * 4
    return Loop(config, folder / "data", str(folder / student), saved, folder / "d")


def all_to_rank_0(*sizes, ranks: int = 1, **rest) -> list[list[list[int]]]:
    """The plan of the micro-batches, but that the other ranks have no response."""
    whole = [part for rank in micro_batches(*sizes, ranks=ranks, **rest) for part in rank]
    return [whole, *([[]] * len(whole) for _ in range(ranks - 1))]


def weights_of(job: Loop) -> dict[str, torch.Tensor]:
    weights = {}
    for name, engine in job.engines.items():
        with engine.gathered():
            for key, parameter in engine.module.named_parameters():
                weights[f"{name} {key}"] = parameter.detach().clone()
    return weights


def train(job: Loop, recorded: list[list[dict]]) -> dict:
    """Steps on recorded roll-outs. In the second all responses are computed by one rank."""
    gradients, curves, seen, weights = {}, [], [], {}

    def keep(name: str, engine, step) -> dict:
        for key, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                gradients[f"{name} {key}"] = safe_get_full_grad(parameter).detach().float().clone()
        engine.step = step
        return step()

    for name, engine in job.engines.items():
        engine.step = lambda name=name, engine=engine, step=engine.step: keep(name, engine, step)
    for step, responses in enumerate(recorded):
        if step in (0, FEW):
            weights[step] = weights_of(job)
        job.rollout = lambda step, some, responses=responses: [
            dict(each) for each in responses if each["slot"] % job.world == job.rank
        ]
        loop.micro_batches = adversary.micro_batches = all_to_rank_0 if step == 1 else micro_batches
        metrics, responses = job.step(step, [], PhaseTimer())
        metrics = average(metrics)
        curves.append([metrics[name] for name in LOSSES])
        seen.append([(each["ids"], each["answer_reward"], each["similarity_reward"]) for each in responses])
    weights[len(recorded)] = weights_of(job)
    del job.rollout
    return {"gradients": gradients, "curves": curves, "seen": seen, "weights": weights}


def live(job: Loop, some: list[tuple[int, dict]]) -> dict[str, float]:
    """A step whose responses are sampled; ranks have different numbers of questions."""
    return average(job.step(STEPS, some[job.rank :: job.world], PhaseTimer())[0])


def taught(folder: Path, student: str, **deepspeed) -> dict[str, torch.Tensor]:
    """A student's weights after SFT, by its checkpoint, on rows of which two in five have a picture."""
    name = f"{student} of {dist.get_world_size()}"
    rows = [json.loads(line) for line in (folder / "data" / "sft.jsonl").read_text().splitlines()]
    rows = [{**row, "image": row["image"] if i < 2 else None} for i, row in enumerate(rows)]
    if dist.get_rank() == 0:
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dist.barrier()
    config = Config.model_validate(settings(folder, **deepspeed))
    rates = TrainingConfig(steps=FEW, batch_size=5, micro_batch_size=2, learning_rate=RATE, final_learning_rate=RATE)
    start = ModelConfig(path=str(folder / student))
    train_supervised(config, rates, start, folder / "data", f"{name}.jsonl", folder / name, "SFT", seed=0)
    dist.barrier()
    return load(ModelConfig(path=str(folder / name)))[0].state_dict()


# Nothing is small enough to stay whole, so that each parameter is sharded, gathered and released.
LORA = {"rank": 4}
SHARDED = {"extra": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
STAGES = {f"zero {stage}": {"zero_stage": stage, **SHARDED} for stage in (0, 1, 2, 3)}
OTHERS = {
    "zero 0, recomputed": {"zero_stage": 0, "gradient_checkpointing": True},
    "zero 2, optimizer on the host": {"zero_stage": 2, "offload_optimizer": True},
    "zero 3, all on the host": {
        "zero_stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
        "gradient_checkpointing": True,
        **SHARDED,
    },
    "zero 2, idle on the host": {"zero_stage": 2, "offload_idle": True},
    "zero 3, idle on the host": {"zero_stage": 3, "offload_idle": True, **SHARDED},
}
BF16 = {f"zero {stage}, bf16": {"zero_stage": stage, "bf16": True, **SHARDED} for stage in (0, 1, 2, 3)}


def main() -> None:
    folder = Path(sys.argv[-1])
    init_distributed()
    recorded = json.loads((folder / "recorded.json").read_text())
    some, out = questions(folder)[:3], {}
    gc.freeze()  # DeepSpeed collects garbage whenever something goes to the host, and Transformers' modules are many
    for name, deepspeed in (STAGES | OTHERS | BF16).items():
        job = make(folder, **deepspeed)
        out[name] = {"dtypes": {str(each.dtype) for each in job.reference.parameters()}}
        if name not in BF16:
            out[name] |= train(job, recorded if name in STAGES else recorded[:FEW])
        out[name]["live"] = live(job, some)
    out["untied"] = train(make(folder, "untied", zero_stage=3, **SHARDED), recorded[:FEW])
    adapted = make(folder, lora=LORA, zero_stage=3, **SHARDED)
    out["adapters"] = train(adapted, recorded[:FEW])
    with adapted.student.gathered():
        out["merged"] = {name: value.clone() for name, value in merged(adapted.policy.model).items()}
    out["taught"] = {name: taught(folder, name, zero_stage=3, **SHARDED) for name in ("student", "untied")}
    if dist.get_rank() == 0:
        torch.save(out, folder / "two.pt")


if __name__ == "__main__":
    sys.exit(main())
