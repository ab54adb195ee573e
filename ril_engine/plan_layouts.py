"""`ril plan --layouts`: the same GPUs shared out in three ways.

- each samples and trains;
- one judges, each of the others samples and trains;
- the paper's: one judges, one samples, the others train, and the sampler gets the new weights after each step.

Sampling and training follow one another, since the responses of a step come from the policy that it trains. Where they
are done by different GPUs they can also overlap, with responses of the policy before: the time of that is given, too.
"""

from __future__ import annotations

from ril_engine.config import Config
from ril_engine.gpus import GPU
from ril_engine.plan import Phase, Plan


def layouts(config: Config, gpus: int, board: GPU) -> list[dict]:
    """A row for each, of least seconds of a step and peak GiB of the fullest GPU; the judge's own are not counted.

    It takes at least 3 GPUs.
    """
    rows = []
    for name, shared in (("all sample and train", gpus), ("1 judges, the others sample and train", gpus - 1)):
        phases = Plan(config, shared, board).phases()
        sampling = sum(each.seconds for each in phases if each.name == "rollout")
        total = sum(each.seconds for each in phases)
        rows.append(_row(name, phases, sampling, total - sampling, 0.0))
    plan = Plan(config, gpus - 2, board, only="training")
    phases = plan.phases()
    training = sum(each.seconds for each in phases)
    whole = config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"zero_stage": 0})})
    sampler = Plan(whole, 1, board, only="sampling").phases()
    moved = sum(each.numel() * each.element_size() for each in plan.model.parameters() if each.requires_grad)
    name = "1 judges, 1 samples, the others train"
    row = _row(name, phases + sampler, sampler[0].seconds, training, moved / board.link_bytes_per_s)
    return [*rows, row | {"overlapped_s": round(max(training, row["sampling_s"] + row["transfer_s"]), 3)}]


def _row(name: str, phases: list[Phase], sampling: float, training: float, transfer: float) -> dict:
    seconds = {"sampling_s": sampling, "transfer_s": transfer, "training_s": training}
    seconds["step_s"] = sampling + transfer + training
    peak = max(each.peak for each in phases) / 2**30
    return {"layout": name, "peak_gib": round(peak, 1)} | {key: round(value, 3) for key, value in seconds.items()}
