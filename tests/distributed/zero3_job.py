"""Run by test_zero3.py through the DeepSpeed launcher: gradients of one batch under ZeRO stage 0 and stage 3."""

import json
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from ril_engine import digits, tiny_models
from ril_engine.config import DeepSpeedConfig, DigitsConfig, ModelConfig
from ril_engine.engine import init_distributed, to_deepspeed
from ril_engine.models import Encoder, load
from ril_engine.policy import Policy

RESPONSES = ("7", "I see 7 and 8. The answer is 56.", "so it is odd.", "The answer is 3.")


def gradients(stage: int, tied: bool, loss_kind: str, folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and full gradients of this stage, summed over both ranks' half of the batch."""
    model, processor = load(ModelConfig(path=str(folder / "model")))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    encoder = Encoder(model, processor, folder / "data", 10_000)
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    batch = encoder.batch(rows[half], [encoder.response(text) for text in RESPONSES[half]])
    settings = to_deepspeed(DeepSpeedConfig(), max_grad_norm=0.0)
    # Nothing is small enough to stay whole, so every parameter is sharded, gathered and released.
    settings["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    policy = Policy(model)
    engine, *_ = deepspeed.initialize(
        model=policy, optimizer=torch.optim.AdamW(policy.parameters(), lr=1e-3), config=settings
    )
    assert stage == 0 or model.lm_head.weight.numel() == 0  # sharded
    if loss_kind == "policy_loss":
        loss, _ = engine(batch, advantages=torch.tensor([1.0, -0.5]), norm=20.0)
    else:  # makes the logits again in backward
        loss = -engine(batch).sum() / 20.0
    engine.backward(loss)
    names = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    out = {name: safe_get_full_grad(each) if stage == 3 else each.grad for name, each in names.items()}
    dist.all_reduce(loss := loss.detach().clone())
    return float(loss), {name: each.detach().clone() for name, each in out.items()}


def main() -> None:
    init_distributed()
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    if dist.get_rank() == 0:
        sizes = DigitsConfig(train_questions=9, validation_questions=1, test_questions=1, sft_questions=1)
        (folder / "data").mkdir()
        (folder / "model").mkdir()
        digits.build(folder / "data", sizes, {})
        tiny_models.build(folder / "model", "tiny:student", [], seed=0)
    dist.barrier()
    results = []
    for tied in (True, False):
        for loss_kind in ("policy_loss", "token_logprob"):
            (loss, whole), (sharded_loss, sharded) = (gradients(s, tied, loss_kind, folder) for s in (0, 3))
            head = "model.model.language_model.embed_tokens.weight" if tied else "model.lm_head.weight"
            off = [
                (sharded[name] - each).abs().max() / each.abs().max().clamp(min=1e-6) for name, each in whole.items()
            ]
            row = {"tied": tied, "loss_kind": loss_kind, "losses": [loss, sharded_loss], "worst": float(max(off))}
            results.append(row | {"names": [len(whole), len(sharded)], "head": float(whole[head].abs().max())})
    if dist.get_rank() == 0:
        print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
