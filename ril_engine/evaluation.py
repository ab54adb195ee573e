"""Accuracy on held-out questions, greedy and sampled, over all ranks; and the comparison of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ril_engine.config import Config
from ril_engine.errors import UserError
from ril_engine.models import Encoder
from ril_engine.rollout import rollout, seed_of
from ril_engine.runlog import progress, read_jsonl
from ril_engine.verifier import verify

MODES = ("greedy", "sampled")
ASKED = ("id", "question", "image", "answer")


def verified(rows: list[dict], responses: list[str], truncated: list[bool]) -> list[float]:
    """1.0 for each response that agrees with its row's reference."""
    some = zip(rows, responses, truncated, strict=True)
    return [0.0 if cut else float(verify(text, row["answer"])) for row, text, cut in some]


def evaluate(
    config: Config,
    model,
    encoder: Encoder,
    questions: list[dict],
    title: str,
    answers: Path | None = None,
    score: Callable[[list[dict], list[str], list[bool]], list[float]] = verified,
) -> dict:
    """{"greedy", "sampled": accuracy, "intervals": of both, "questions", "by_kind": greedy, "mean_length": of the
    sampled, in tokens}.

    Accuracy is the mean `score` of (rows, responses, truncated). Every question's two answers and their scores are
    written to the JSONL file `answers`, if one is named.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(questions), world))
    size, was_training = config.sampling.batch_size, model.training
    sampler, seed, records = rollout(model, encoder, config.sampling), seed_of(config.seed, 2), []
    model.eval()
    with progress(2 * len(mine), title, enabled=rank == 0) as advance:
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            rows = [(i, questions[i]) for i in part]
            some = [
                {"place": i, "kind": row.get("kind", "question"), **{name: row.get(name) for name in ASKED}}
                for i, row in rows
            ]
            for mode in MODES:
                drawn = sampler.generate(rows, 1, seed=seed, greedy=mode == "greedy", advance=advance)
                made = [each for (each,) in drawn]
                scores = score(
                    [row for _, row in rows], [each.text for each in made], [each.truncated for each in made]
                )
                for record, each, value in zip(some, made, scores, strict=True):
                    record |= {mode: value, f"{mode}_text": each.text, f"{mode}_length": len(each.ids)}
            records += some
    model.train(was_training)
    gathered: list = [None] * world
    dist.all_gather_object(gathered, records)
    table = sorted((record for part in gathered for record in part), key=lambda record: record["place"])
    if answers is not None and rank == 0:
        answers.write_text("".join(json.dumps(record) + "\n" for record in table), encoding="utf-8")
    by_kind = {}
    for kind in dict.fromkeys(record["kind"] for record in table):
        some = [record for record in table if record["kind"] == kind]
        by_kind[kind] = {
            "accuracy": _mean(some, "greedy"),
            "interval": interval([record["greedy"] for record in some]),
            "questions": len(some),
        }
    mean = {mode: _mean(table, mode) for mode in MODES} | {"mean_length": _mean(table, "sampled_length")}
    intervals = {mode: interval([record[mode] for record in table]) for mode in MODES}
    return {**mean, "intervals": intervals, "questions": len(table), "by_kind": by_kind}


def _mean(records: list[dict], name: str) -> float:
    return sum(record[name] for record in records) / len(records)


def interval(scores: list[float]) -> list[float]:
    """Of 95 % for a mean over questions: Wilson's where all scores are 0 or 1, else 1.96 standard errors each way."""
    z, n, mean = 1.96, len(scores), sum(scores) / len(scores)
    if all(value in (0.0, 1.0) for value in scores):
        centre, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]
    half = z * math.sqrt(sum((value - mean) ** 2 for value in scores) / max(n - 1, 1) / n)
    return [mean - half, mean + half]


def compare(runs: list[Path], against: list[Path], draws: int = 10_000) -> dict:
    """Accuracy after the `runs` minus accuracy after the runs `against`, with a paired bootstrap interval of 95 %.

    A draw takes questions with replacement, the same ones for both sides, and runs with replacement: the i-th of
    `runs` goes with the i-th of `against` where there are as many, so give them in the order of their seeds. Few runs
    show too little of what comes of the seeds (of 3, two thirds of that variance): look at each difference too.

    Raises:
        UserError: a run that has not ended, or runs evaluated on different questions.
    """
    tables = {run: _answers(run) for run in (*runs, *against)}
    asked = {run: [[row.get(name) for name in ASKED] for row in rows] for run, rows in tables.items()}
    for run in tables:
        if asked[run] != asked[runs[0]]:
            raise UserError(f"run {run}: not evaluated on the questions of {runs[0]}; compare runs of one data set")
    out = {"questions": len(asked[runs[0]])}
    generator = torch.Generator().manual_seed(0)
    for mode in MODES:
        one, two = (
            torch.tensor([[row[mode] for row in tables[run]] for run in side], dtype=torch.float64)
            for side in (runs, against)
        )
        differences = []
        for _ in range(draws):
            picks = torch.randint(one.shape[1], (one.shape[1],), generator=generator)
            of_one = torch.randint(len(one), (len(one),), generator=generator)
            of_two = of_one if len(one) == len(two) else torch.randint(len(two), (len(two),), generator=generator)
            differences.append(one[of_one][:, picks].mean() - two[of_two][:, picks].mean())
        low, high = torch.stack(differences).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        out[mode] = {
            "runs": one.mean(1).tolist(),
            "against": two.mean(1).tolist(),
            "difference": float(one.mean() - two.mean()),
            "interval": [low, high],
        }
    return out


def _answers(run: Path) -> list[dict]:
    path = run / "evaluation_after.jsonl"
    if not path.exists():
        raise UserError(f"run {run}: no evaluation_after.jsonl there; expected the folder of a run that has ended")
    return read_jsonl(path)
