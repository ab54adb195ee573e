"""Accuracy on held-out questions, greedy and sampled, over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ril_engine.config import Config
from ril_engine.models import Encoder, generate, uniforms
from ril_engine.rewards import answer_reward
from ril_engine.runlog import progress


def evaluate(config: Config, model, encoder: Encoder, questions: list[dict], title: str) -> dict:
    """{"greedy", "sampled": accuracy, "questions", "by_kind": greedy, "mean_length": of the sampled, in tokens}."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(questions), world))
    size, was_training = config.evaluation.batch_size, model.training
    records = []
    model.eval()
    with progress(2 * len(mine), title, enabled=rank == 0) as advance:
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            rows = [questions[i] for i in part]
            numbers = uniforms(config.seed, [(2, i) for i in part], config.sampling.max_new_tokens)
            correct = []
            for draws in (None, numbers):
                decoded = generate(model, encoder, rows, config.sampling, uniforms=draws, batch_size=size)
                correct.append(
                    [
                        0.0 if cut else answer_reward(encoder.decode(ids), row["answer"])
                        for (ids, cut), row in zip(decoded, rows, strict=True)
                    ]
                )
                advance(len(part))
            lengths = [len(ids) for ids, _ in decoded]
            kinds = [row.get("kind", "question") for row in rows]
            records += list(zip(kinds, *correct, lengths, strict=True))
    model.train(was_training)
    gathered: list = [None] * world
    dist.all_gather_object(gathered, records)
    table = [record for part in gathered for record in part]
    kinds, greedy, sampled, lengths = zip(*table, strict=True)
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        values = [g for k, g in zip(kinds, greedy, strict=True) if k == kind]
        by_kind[kind] = {"accuracy": sum(values) / len(values), "questions": len(values)}
    mean = {
        name: float(torch.tensor(v, dtype=torch.float64).mean())
        for name, v in (("greedy", greedy), ("sampled", sampled), ("mean_length", lengths))
    }
    return {**mean, "questions": len(table), "by_kind": by_kind}
