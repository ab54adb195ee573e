"""The discriminator at work: its pre-training on saved responses, and its part in a step of Algorithm 2.

Labels: student = 1, teacher = 0. N responses over all ranks; each rank computes a share and then knows all logits.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ril_engine.config import Config, ModelConfig
from ril_engine.discriminator import (
    Discriminator,
    discriminator_batch,
    encode_for_discriminator,
    new_discriminator,
)
from ril_engine.engine import Engine, device, freeze, rest, training_dtype, wake
from ril_engine.errors import UserError
from ril_engine.health import accuracy, auc, health
from ril_engine.packing import micro_batches, shared_tokens
from ril_engine.placement import to_device
from ril_engine.runlog import Skipped, progress
from ril_kernels import discriminator_loss, similarity_reward

WEIGHTS = "discriminator.safetensors"
HELD_OUT = 4096  # responses, at most, that a look at the held-out accuracy scores
MicroBatch = tuple[list[int], tuple[dict[str, Tensor], Tensor]]  # numbers of its responses, what `Discriminator` takes


def bradley_terry_loss(logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:  # (N,), (N,) bool, (N,)
    """Mean of -log sigmoid(logit of a student's - logit of a teacher's) over all pairs of one group (GAD, arXiv
    2511.10643)."""
    pairs = labels[:, None] & ~labels & (groups[:, None] == groups)  # (N, N)
    return F.softplus(logits - logits[:, None])[pairs].mean()


def centred(logits: Tensor, groups: Tensor) -> Tensor:  # (N,), (N,) -> (N,)
    """Logits less the mean of their group's."""
    _, group, counts = groups.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, group, logits.double()) / counts
    return (logits.double() - means[group]).to(logits.dtype)


class Adversary:
    """D, and the engine that trains it, if any. All ranks call each method, with the same responses."""

    def __init__(self, config: Config, module: Discriminator, tokenizer, engine: Engine | None = None):
        self.settings, self.rl, self.deepspeed = config.discriminator, config.rl, config.deepspeed
        self.module, self.tokenizer, self.engine = module, tokenizer, engine

    @classmethod
    def pretrained(cls, config: Config, student: ModelConfig, folder: Path) -> Adversary:
        """As the stage left it in `folder`: to be updated in the loop, or fixed and without an engine."""
        from safetensors.torch import load_file

        settings, rl = config.discriminator, config.rl
        dtype = training_dtype(config.deepspeed)
        module, tokenizer = new_discriminator(student, rl.packing, settings.temperature, device(), dtype)
        module.load_state_dict(load_file(folder / WEIGHTS))
        if settings.use == "fixed":
            freeze(module, config.deepspeed)
            return cls(config, module, tokenizer)
        rates = settings.model_dump(include={"learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"})
        engine = Engine(module, config=config.deepspeed, steps=rl.steps * rl.updates_per_step, **rates)
        return cls(config, module, tokenizer, engine)

    def wake(self) -> None:
        """Before it is used, where it was at rest."""
        if self.engine is not None:
            self.engine.wake()
        else:
            wake(self.module, self.deepspeed)

    def rest(self) -> None:
        """With offload_idle: it waits on the host."""
        if self.engine is not None:
            self.engine.rest()
        else:
            rest(self.module, self.deepspeed)

    def encode(self, texts: list[str]) -> list[MicroBatch]:
        """This rank's micro-batches, of which every rank has as many. One without any response (they are too few for
        all ranks) is computed on the first one, which does not count there."""
        rows = encode_for_discriminator(self.tokenizer, self.settings.instruction, texts)
        shared = shared_tokens(rows)  # D's instruction, but for what the tokenizer joins with a text
        own, same = [len(row) - shared for row in rows], [0] * len(rows)
        budget, ranks = self.rl.micro_batch_tokens, dist.get_world_size()
        planned = micro_batches(self.rl.packing, same, [shared] * len(rows), own, budget=budget, ranks=ranks)
        pad_id, packing = self.tokenizer.pad_token_id, self.rl.packing
        return [
            (part, to_device(discriminator_batch([rows[i] for i in part or [0]], pad_id, packing, shared), device()))
            for part in planned[dist.get_rank()]
        ]

    @torch.no_grad()
    def logits(self, batches: list[MicroBatch], count: int) -> Tensor:  # (count,) float32
        self.module.eval()
        return _of_all_ranks([(part, self.module(*inputs).logits) for part, inputs in batches], count)

    def loss(self, logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        """The objective over all responses."""
        if self.settings.objective == "bradley_terry":
            return bradley_terry_loss(logits, labels, groups)
        smoothing = self.settings.label_smoothing
        return discriminator_loss(logits, labels * (1 - 2 * smoothing) + smoothing, norm=len(labels))

    def scored(self, logits: Tensor, groups: Tensor) -> Tensor:
        """The logits whose sigmoid is the score: bradley_terry only tells responses of a group from one another."""
        return centred(logits, groups) if self.settings.objective == "bradley_terry" else logits

    def train(self, batches: list[MicroBatch], labels: Tensor, groups: Tensor) -> tuple[Tensor, float]:
        """One update. Returns the (N,) logits before it, and the norm of the gradient."""
        slope = None
        if self.settings.objective == "bradley_terry":  # its pairs cross micro-batches and ranks
            before = self.logits(batches, len(labels)).requires_grad_()
            (slope,) = torch.autograd.grad(self.loss(before, labels, groups), before)
        self.module.train()
        seen = []
        for number, (part, inputs) in enumerate(batches, 1):
            index = part or [0]
            if slope is None:
                smoothing, own = self.settings.label_smoothing, to_device(labels[index], device())
                out = self.engine(*inputs, labels=own, label_smoothing=smoothing, norm=len(labels))
                loss = out.loss
            else:
                out = self.engine(*inputs)
                loss = (to_device(slope[index], device()) * out.logits).sum()
            self.engine.backward(loss * bool(part), last=number == len(batches))
            seen.append((part, out.logits.detach()))
        grad_norm = self.engine.step()["grad_norm"]
        return _of_all_ranks(seen, len(labels)), grad_norm

    def update(self, responses: list[dict]) -> dict[str, float]:
        """mu updates on a step's responses, then the score and similarity reward of each, by the updated D."""
        count, sources = len(responses), [each["source"] for each in responses]
        labels = torch.tensor([source == "student" for source in sources])
        groups = torch.tensor([each["slot"] for each in responses])
        batches = self.encode([each["text"] for each in responses])
        limit, updates = self.settings.max_accuracy, self.rl.updates_per_step if self.engine is not None else 0
        before = None
        if not updates or limit is not None:
            before = self.logits(batches, count)
            if limit is not None and accuracy(self.scored(before, groups).sigmoid(), labels) >= limit:
                updates = 0
        out = {"discriminator/updates": float(updates), "skipped/discriminator": 0.0}
        for _ in range(updates):
            first, out["grad_norm/discriminator"] = self.train(batches, labels, groups)
            out["skipped/discriminator"] += not math.isfinite(out["grad_norm/discriminator"])
            before = first if before is None else before
        logits = self.scored(self.logits(batches, count) if updates else before, groups)
        rewards, scores = similarity_reward(logits, self.settings.similarity_levels), logits.sigmoid()
        for each, reward, score in zip(responses, rewards.tolist(), scores.tolist(), strict=True):
            each["similarity_reward"], each["score"] = reward, score
        out["loss/discriminator"] = float(self.loss(before, labels, groups))
        lengths = torch.tensor([len(each["ids"]) for each in responses])
        return out | health(self.scored(before, groups).sigmoid(), scores, rewards, sources, lengths)


def _of_all_ranks(parts: list[tuple[list[int], Tensor]], count: int) -> Tensor:  # (count,) float32, on every rank
    out = torch.zeros(count, device=device())
    for part, logits in parts:
        out[to_device(torch.tensor(part, dtype=torch.int64), device())] = logits[: len(part)].float()
    dist.all_reduce(out)
    return out.cpu()


Question = dict[str, list[str]]  # source -> texts of its responses


def by_question(responses: dict[str, list[dict]], share: float) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and the `share` held out, chosen by the hash of their ids.

    Only those that both sides have answered: what a question is about would tell the sides apart otherwise.

    Raises:
        UserError: there is none in one of the two parts.
    """
    questions: dict[str, Question] = {}
    for source, rows in responses.items():
        for row in rows:
            questions.setdefault(row["id"], {}).setdefault(source, []).append(row["text"])
    training, held = [], []
    for id, question in questions.items():
        if "student" in question and len(question) > 1:
            bucket = int(hashlib.sha256(id.encode()).hexdigest(), 16) % 1000
            (held if bucket < 1000 * share else training).append(question)
    for part, name in ((training, "training"), (held, "its held-out part")):
        if not part:
            raise UserError(
                f"D pre-training: no question in {name} has saved responses of the student and of a teacher; raise "
                "responses.questions or set another discriminator.validation_share"
            )
    return training, held


def draw(
    questions: list[Question], weights: dict[str, float], count: int, generator: torch.Generator
) -> tuple[list[str], list[str]]:
    """`count` questions, and of each a response of the student and one of a teacher, chosen by `weights`: sources and
    texts, (2 count) each, the two of a question side by side."""

    def pick(size: int) -> int:
        return int(torch.randint(size, (), generator=generator))

    sources, texts = [], []
    for _ in range(count):
        question = questions[pick(len(questions))]
        teachers = [name for name in question if name != "student"]
        odds = torch.tensor([weights[name] for name in teachers])
        for source in ("student", teachers[int(torch.multinomial(odds, 1, generator=generator))]):
            sources.append(source)
            texts.append(question[source][pick(len(question[source]))])
    return sources, texts


class HeldOut:
    """The held-out responses, those of the first questions where there are many, and how well D tells their sides."""

    def __init__(self, adversary: Adversary, questions: list[Question]):
        flat = [(i, s, text) for i, question in enumerate(questions) for s in question for text in question[s]]
        flat = flat[:HELD_OUT]  # by question, so that both sides stay
        groups, self.sources, texts = zip(*flat, strict=True)
        self.adversary, self.groups = adversary, torch.tensor(groups)
        self.labels = torch.tensor([source == "student" for source in self.sources])
        self.batches = adversary.encode(list(texts))

    def look(self) -> dict:
        """The accuracy is the mean of both sides', however many responses each has."""
        logits = self.adversary.logits(self.batches, len(self.sources))
        scores = self.adversary.scored(logits, self.groups).sigmoid()

        def right(some: Tensor) -> float:
            return accuracy(scores[some], self.labels[some])

        each = {name: right(torch.tensor([s == name for s in self.sources])) for name in sorted(set(self.sources))}
        balanced = (right(self.labels) + right(~self.labels)) / 2
        return {"accuracy": balanced, "auc": auc(scores, self.labels), "accuracy_by_source": each}


def pretrain(config: Config, student: ModelConfig, responses: dict[str, list[dict]], out: Path) -> None:
    """Train D on saved responses (source -> rows with id and text); the weights that do best on the held-out questions
    go to `out`, with metrics.json. Half of each batch is the student's."""
    from safetensors.torch import save_file

    settings, every = config.discriminator.pretrain, config.discriminator.pretrain.validate_every
    training, held = by_question(responses, config.discriminator.validation_share)
    weights = {each.name: each.weight for each in config.teachers}
    dtype, temperature = training_dtype(config.deepspeed), config.discriminator.temperature
    module, tokenizer = new_discriminator(student, config.rl.packing, temperature, device(), dtype)
    rates = settings.model_dump(exclude={"batch_size", "validate_every", "patience"})
    engine = Engine(module, config=config.deepspeed, **rates)
    adversary = Adversary(config, module, tokenizer, engine)
    held_out = HeldOut(adversary, held)
    looks = {*range(every, settings.steps, every), settings.steps}
    main, history, best, state = dist.get_rank() == 0, [], None, {}
    skipped = Skipped("D pre-training", config.rl.max_skipped_steps)
    with progress(settings.steps, "D pre-training", enabled=main) as advance:
        for step in range(settings.steps + 1):
            if step:
                generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
                sources, texts = draw(training, weights, max(1, settings.batch_size // 2), generator)
                labels = torch.tensor([source == "student" for source in sources])
                _, norm = adversary.train(adversary.encode(texts), labels, groups=torch.arange(len(texts)) // 2)
                skipped(step, norm)
                advance(1, **({"accuracy": history[-1]["accuracy"]} if history else {}))
            if step not in looks:
                continue
            history.append({"step": step, **held_out.look()})
            found = (history[-1]["accuracy"], history[-1]["auc"])
            if best is None or found > (best["accuracy"], best["auc"]):
                best = history[-1]
                with engine.gathered():
                    if main:
                        state = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
            if len(history) - history.index(best) > settings.patience:
                break
    if main:
        metrics = {f"held_out_{name}": best[name] for name in ("accuracy", "auc", "accuracy_by_source")}
        metrics |= {"held_out_responses": len(held_out.sources)}
        metrics |= {"best_step": best["step"], "steps": history[-1]["step"], "skipped": skipped.count}
        (out / "metrics.json").write_text(json.dumps(metrics | {"history": history}))
        save_file(state, out / WEIGHTS)
