"""Algorithm 2 of RIL (arXiv 2510.19307): one step, phase by phase.

N = responses of a step over all ranks: its questions x G of the student (+ G of the teachers). A rank samples those to
its own questions, then knows all of them, and trains D and the student on a share that costs as much as any other.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import set_seed

from ril_engine.adversary import Adversary
from ril_engine.config import Config
from ril_engine.engine import Engine, device, freeze, rest, training_dtype, wake
from ril_engine.errors import OutsideError, UserError
from ril_engine.families import adapt, language_model, look_once, vision_tower
from ril_engine.lora import add_adapters, without
from ril_engine.models import Batch, Encoder, load
from ril_engine.packing import micro_batches
from ril_engine.placement import to_device
from ril_engine.policy import Policy
from ril_engine.rewards import AnswerRewards
from ril_engine.rollout import rollout, seed_of
from ril_engine.runlog import PhaseTimer
from ril_engine.teachers import divide, weights_of
from ril_kernels import group_advantages

# A mean over this rank's share where all shares are equal; (sum, count) where they are not.
Metric = float | tuple[float, float]


class Loop:
    """Algorithm 2: what the steps share, and one method per phase of a step."""

    def __init__(self, config: Config, data_dir: Path, student_path: str, saved: dict[str, list], d_path: Path | None):
        rl = config.rl
        self.config, self.saved = config, saved
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # Where ranks meet after a rollout: a judge's server may be slow on one of them for longer than others wait.
        self.meeting = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        start = config.student.model_copy(update={"path": student_path})
        model, processor = load(start, training_dtype(config.deepspeed))
        look = None
        if not rl.train_vision_tower:
            vision_tower(model).requires_grad_(False)
            # With offload_idle it is on the host while a batch is made.
            look = None if config.deepspeed.offload_idle else look_once(model)
        adapt(language_model(model), rl.packing, device())
        adapters = None if rl.lora is None else add_adapters(model, rl.lora, seed_of(config.seed, 5) % 2**32)
        self.policy = Policy(model)
        self.beta = rl.beta if rl.algorithm != "sft" else 0.0
        self.reference = self._reference(adapters) if self.beta > 0 else None
        self.encoder = Encoder(model, processor, data_dir, config.data.max_image_pixels, look)
        self.student = Engine(
            self.policy,
            config=config.deepspeed,
            steps=rl.steps * rl.updates_per_step,
            save_frozen=rl.lora is None,
            whole=None if rl.train_vision_tower else vision_tower(model),
            sampled=True,
            **{name: getattr(rl, name) for name in ("learning_rate", "final_learning_rate", "warmup_steps")},
            **{name: getattr(rl, name) for name in ("weight_decay", "max_grad_norm")},
        )
        self.engines = {"student": self.student}
        self.rewards = AnswerRewards(config, config.work_dir / "judged" / f"rank-{self.rank}")
        self.sampler = rollout(model, self.encoder, config.sampling)  # on the device that the engine has moved it to
        self.adversary = None if d_path is None else Adversary.pretrained(config, start, d_path)
        if self.adversary is not None and self.adversary.engine is not None:
            self.engines["discriminator"] = self.adversary.engine
            self.adversary.rest()
        self.student.rest()

    def _reference(self, adapters) -> Callable[[Batch], torch.Tensor]:
        """Log-probs of the policy as RIL starts: of the student without its adapters, or of a copy of it."""
        if adapters is None:
            reference = copy.deepcopy(self.policy)
            freeze(reference, self.config.deepspeed, whole=vision_tower(reference.model))
            return reference

        def reference(batch: Batch) -> torch.Tensor:
            self.policy.eval()
            with without(adapters):
                return self.policy(batch)

        return reference

    def rollout(self, step: int, questions: list[tuple[int, dict]]) -> list[dict]:
        """G responses of the student per question, then G saved ones of the teachers, drawn without replacement."""
        config, group = self.config, self.config.rl.group_size
        slots = range(self.rank, self.world * len(questions), self.world)  # places among the step's questions
        if config.rl.algorithm == "sft":
            chosen = [self._teachers(step, slot, *question) for slot, question in zip(slots, questions, strict=True)]
            return [each for some in chosen for each in some]
        self.policy.eval()
        with self.student.gathered():
            drawn = self.sampler.generate(questions, group, seed=seed_of(config.seed, 3, step))
        responses = []
        for slot, (number, row), own in zip(slots, questions, drawn, strict=True):
            for each in own:
                responses.append(
                    {"slot": slot, "row": row, "source": "student", "text": each.text, "ids": each.ids}
                    | {"truncated": each.truncated, "sampler_logprobs": each.sampler_logprobs}
                    | {"prompt_tokens": self._prompt_tokens(row)}
                )
            if config.rl.algorithm == "ril":
                responses += self._teachers(step, slot, number, row)
        return responses

    def _teachers(self, step: int, slot: int, number: int, row: dict) -> list[dict]:
        """G saved responses of the teachers to a question, by weight and without replacement."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step * 1009 + number)
        pools = {name: by_id[row["id"]] for name, by_id in self.saved.items()}
        available = {name: len(pool) for name, pool in pools.items()}
        counts = divide(self.config.rl.group_size, weights_of(self.config), available, generator)
        chosen = []
        for name, count in counts.items():
            pool = pools[name]
            picks = torch.randperm(len(pool), generator=generator)[:count].tolist()
            for i in picks:
                ids = self.encoder.response(pool[i]["text"], eos=not pool[i]["truncated"])
                record = {name: pool[i][name] for name in ("source", "text", "truncated", "answer_reward")}
                record |= {"slot": slot, "row": row, "prompt_tokens": self._prompt_tokens(row)}
                chosen.append({"ids": ids or self.encoder.eos_ids[:1], **record})
        return chosen

    def judge(self, responses: list[dict]) -> None:
        """The answer reward of the student's responses; the teachers' are stored."""
        own = [each for each in responses if each["source"] == "student"]
        rows, texts, truncated = ([each[name] for each in own] for name in ("row", "text", "truncated"))
        try:
            scores = self.rewards.score(rows, texts, truncated)
        except UserError as error:
            raise OutsideError(str(error)) from error
        for each, score in zip(own, scores, strict=True):
            each |= {"answer_reward": score.reward, "parts": score.parts, "unscored": score.unscored}

    def _prompt_tokens(self, row: dict) -> int:
        """Known where the response is made, so that no rank prepares the pictures of all."""
        return self.encoder.prompt(row)["input_ids"].shape[1]

    def _micro_batches(self, keys: list[int], prefix: list[int], own: list[int]) -> list[list[int]]:
        """The responses of this rank's micro-batches, of which every rank has as many. One without any (they are too
        few for all ranks) is computed on the first response, which does not count there."""
        rl = self.config.rl
        planned = micro_batches(rl.packing, keys, prefix, own, budget=rl.micro_batch_tokens, ranks=self.world)
        return planned[self.rank]

    def advantages(self, responses: list[dict]) -> torch.Tensor:
        """(N,) group advantages of R = R_sim + R_ans over all responses of a question; 1 where sft imitates all."""
        if self.config.rl.algorithm == "sft":  # with r = 1 the gradient is then the log-prob's
            return torch.ones(len(responses))
        rewards = torch.tensor([each["answer_reward"] + each.get("similarity_reward", 0.0) for each in responses])
        groups = torch.tensor([each["slot"] for each in responses])
        kind = "grpo" if self.config.rl.algorithm == "grpo" else "dr_grpo"
        return group_advantages(rewards, groups, kind=kind)

    def update_policy(self, responses: list[dict], advantages: torch.Tensor, timer: PhaseTimer) -> dict[str, Metric]:
        """mu updates of the student. With mu > 1 the first pass's own log-probs are the behaviour policy's."""
        rl, count, limit = self.config.rl, len(responses), self.config.sampling.max_new_tokens
        on_student = rl.kl_on == "student"
        kl_count = rl.group_size * rl.questions_per_step if on_student else count
        per_token = 1 if rl.algorithm == "grpo" else limit
        norm = rl.policy_denominator or count * per_token
        kl_norm = rl.kl_denominator or kl_count * per_token
        slots, lengths = [each["slot"] for each in responses], [len(each["ids"]) for each in responses]
        prompts = [each["prompt_tokens"] for each in responses]
        prepared = []
        for part in self._micro_batches(slots, prompts, lengths):
            index = part or [0]
            some = [responses[i] for i in index]
            batch = self.encoder.batch([each["row"] for each in some], [each["ids"] for each in some], rl.packing)
            batch = batch.to(device())
            settings = {"advantages": advantages[index], "norm": norm, "beta": self.beta}
            settings |= {"clip_low": rl.clip_low, "clip_high": rl.clip_high}
            settings["loss_type"] = "grpo" if rl.algorithm == "grpo" else "dr_grpo"
            keep = torch.tensor([bool(part) and not (rl.mask_truncated and each["truncated"]) for each in some])
            settings["mask"] = keep[batch.response_index]
            unknown = [math.nan]  # a teacher's tokens were not sampled here
            sampler = [v for each in some for v in each.get("sampler_logprobs", unknown * len(each["ids"]))]
            if self.reference is not None:
                own = torch.tensor([not on_student or each["source"] == "student" for each in some])
                settings |= {"kl_mask": settings["mask"] & own[batch.response_index], "kl_norm": kl_norm}
            sampler = torch.tensor(sampler)
            if rl.importance_cap is not None:
                settings |= {"sampler_logprobs": to_device(sampler, device()), "importance_cap": rl.importance_cap}
            prepared.append((batch, settings, sampler))
        if self.reference is not None:
            copied = isinstance(self.reference, Policy)
            if copied:
                wake(self.reference, self.config.deepspeed)
            with timer.phase("reference"), torch.no_grad():
                for batch, settings, _ in prepared:
                    settings["reference_logprobs"] = self.reference(batch)
            if copied:
                rest(self.reference, self.config.deepspeed)
        self.student.wake()
        self.policy.train()
        out: dict[str, Metric] = {}
        skipped = 0  # updates
        gap, sampled = 0.0, 0  # how far the trainer's own log-probs are from the sampler's, over what both have
        for update in range(rl.updates_per_step):
            losses, records = [], []
            for batch, settings, _ in prepared:
                loss, record = self.student(batch, **settings)
                self.student.backward(loss, last=batch is prepared[-1][0])
                if update == 0 and rl.updates_per_step > 1:
                    settings["behavior_logprobs"] = record.logprobs
                losses.append(loss.detach())
                records.append(record)
            norms = self.student.step()
            skipped += not math.isfinite(norms["grad_norm"])
            # Read after the update, so that no micro-batch waits for the one before it.
            if update == 0:
                logprobs = torch.cat([each.logprobs for each in records]).cpu().split([len(s) for *_, s in prepared])
                for (_, settings, sampler), own in zip(prepared, logprobs, strict=True):
                    some = settings["mask"] & (own != 0) & sampler.isfinite()
                    gap += float((own - sampler)[some].abs().sum())
                    sampled += int(some.sum())
            out = _means(losses, records) | {"sampler/gap": (gap, sampled)}
            out["loss/policy"] *= self.world
            out |= {"grad_norm/student": norms["grad_norm"], "learning_rate": norms["learning_rate"]}
            out["skipped/student"] = float(skipped)
        self.student.rest()
        return out

    def _of_all_ranks(self, values: list) -> list:
        gathered: list = [None] * self.world
        dist.all_gather_object(gathered, values, group=self.meeting)
        return [each for part in gathered for each in part]

    def step(
        self, step: int, questions: list[tuple[int, dict]], timer: PhaseTimer
    ) -> tuple[dict[str, Metric], list[dict]]:
        """One step of Algorithm 2 with this rank's questions: sample, update D, score, update the student."""
        mine, error = [], None
        set_seed(
            seed_of(self.config.seed, 4, step, self.rank) % 2**32
        )  # for what draws without a generator, as dropout does
        try:
            with timer.phase("rollout"):
                mine = self.rollout(step, questions)
            with timer.phase("judge"):
                self.judge(mine)
        except UserError as caught:
            error = type(caught), str(caught)
        errors = [each for each in self._of_all_ranks([error]) if each is not None]
        if errors:  # on every rank, so that none waits for one that has left
            kind, message = errors[0]
            raise kind(f"step {step + 1}: {message}")
        responses = sorted(self._of_all_ranks(mine), key=lambda each: each["slot"])
        metrics: dict[str, Metric] = {}
        if self.adversary is not None:
            with timer.phase("discriminator"):
                self.adversary.wake()
                metrics |= self.adversary.update(responses)
                self.adversary.rest()
        advantages = self.advantages(responses)
        for each, advantage in zip(responses, advantages.tolist(), strict=True):
            each["advantage"] = advantage
        with timer.phase("policy"):
            metrics |= self.update_policy(responses, advantages, timer)
        return metrics | _describe(responses, advantages), responses


def _means(losses: list[torch.Tensor], records: list) -> dict[str, Metric]:
    """Of one update's micro-batches, from the loss and the PolicyMetrics of each; all of it is read at once."""
    names = ["num_tokens", "num_computed", "entropy", "clip_low_fraction", "clip_high_fraction", "ratio_max"]
    names += [] if records[0].kl is None else ["kl", "num_kl_tokens"]
    rows = [[loss, *(getattr(each, name) for name in names)] for loss, each in zip(losses, records, strict=True)]
    table = torch.stack([torch.stack([value.double() for value in row]) for row in rows]).tolist()
    of = dict(zip(("loss", *names), zip(*table, strict=True), strict=True))

    def mean(name: str, count: str = "num_computed") -> tuple[float, float]:  # a record's means are over what it counts
        return sum(value * number for value, number in zip(of[name], of[count], strict=True)), sum(of[count])

    out: dict[str, Metric] = {
        "loss/policy": sum(of["loss"]),
        "tokens": sum(of["num_tokens"]),
        "entropy": mean("entropy"),
    }
    out |= {"clip/low": mean("clip_low_fraction"), "clip/high": mean("clip_high_fraction")}
    out["ratio/max"] = max(of["ratio_max"])
    return out | ({} if records[0].kl is None else {"kl": mean("kl", "num_kl_tokens")})


def _describe(responses: list[dict], advantages: torch.Tensor) -> dict[str, Metric]:
    def mean(values: list[float]) -> float:
        return sum(values) / max(1, len(values))

    out: dict[str, Metric] = {"advantage/spread": (float(advantages.square().sum()), len(advantages))}
    by_slot: dict[int, list[float]] = {}
    for each in responses:
        by_slot.setdefault(each["slot"], []).append(abs(each["advantage"]))
    out["zero_advantage_groups"] = mean([float(max(values) == 0) for values in by_slot.values()])
    for side in ("student", "teacher"):
        some = [each for each in responses if (each["source"] == "student") == (side == "student")]
        if some:
            out[f"reward/{side}_answer"] = mean([each["answer_reward"] for each in some])
            out[f"length/{side}"] = mean([len(each["ids"]) for each in some])
    teachers = dict.fromkeys(each["source"] for each in responses if each["source"] != "student")
    for name in teachers:
        some = [each for each in responses if each["source"] == name]
        out[f"reward/answer/{name}"] = mean([each["answer_reward"] for each in some])
        out[f"length/{name}"] = mean([len(each["ids"]) for each in some])
        out[f"advantage/{name}"] = mean([each["advantage"] for each in some])
    own = [each for each in responses if each["source"] == "student"]
    out["truncated"] = mean([float(each["truncated"]) for each in own])
    if own:
        out["reward/unscored"] = mean([float(each["unscored"] > 0) for each in own])
        totals = Counter(round(2 * (each["answer_reward"] + each.get("similarity_reward", 0.0))) / 2 for each in own)
        out |= {f"reward/histogram/{total:g}": count / len(own) for total, count in totals.items()}
        parts = own[0]["parts"]
        for name in parts if len(parts) > 1 else ():
            out[f"reward/student/{name}"] = mean([each["parts"][name] for each in own])
    return out


def average(metrics: dict[str, Metric]) -> dict[str, float]:
    """Over all ranks, once per step. Advantages have mean 0, so their spread is the root of their mean square."""
    names = sorted(metrics)
    pairs = [value if isinstance(value, tuple) else (value, 1) for value in (metrics[name] for name in names)]
    sums = torch.tensor(pairs, dtype=torch.float64)
    largest = sums[:, 0].clone()
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    out = dict(zip(names, (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist(), strict=True))
    out["tokens"] = float(sums[names.index("tokens"), 0])
    out["ratio/max"] = float(largest[names.index("ratio/max")])
    return out | {"advantage/spread": math.sqrt(out["advantage/spread"])}


def scheduled(config: Config, rows: list[dict], step: int) -> list[int]:
    """The questions of a step: an order per epoch that depends on the seed only."""
    need = config.rl.questions_per_step
    picks = []
    for place in range(step * need, (step + 1) * need):
        epoch, offset = divmod(place, len(rows))
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        picks.append(int(torch.randperm(len(rows), generator=generator)[offset]))
    return picks
