"""`ril plan`: whether a config fits its GPUs, and the least time that a step can take. It needs no GPU and no weights.

The phases of a step run as in loop.py on tensors without contents (ledger.py), with the longest responses that the
config allows, on the micro-batch that has most tokens. What DeepSpeed holds besides is
allocated as its stages do (plan_engine.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ril_engine.config import Config
from ril_engine.discriminator import Discriminator, discriminator_batch
from ril_engine.engine import training_dtype
from ril_engine.errors import UserError
from ril_engine.families import adapt, language_model, look_once, vision_tower
from ril_engine.gpus import GPU, gpu_named
from ril_engine.ledger import Ledger, counted
from ril_engine.packing import micro_batches
from ril_engine.plan_engine import Trained, Weights
from ril_engine.plan_models import Questions, as_on_gpu, fake_model, model_config
from ril_engine.policy import Policy
from ril_engine.rollout.engine import PREFILL_TOKENS, Rollout
from ril_kernels.token_logprob import memory

AWAKE = {  # of what can wait on the host, what a phase needs
    "discriminator": ("discriminator",),
    "reference": ("reference",),
    "policy": ("optimiser",),
    "optimiser step": ("optimiser",),
}
OWN = "working"  # of a phase: activations, gradients, a chunk of logits, buckets
CHARACTERS_PER_TOKEN = 4  # of D's instruction, whose tokenizer is not at hand
CHAT_TOKENS = 24  # of D's two turns and the marks around a response


@dataclass
class Phase:
    """Bytes on a GPU at the phase's worst moment and by what they hold, and seconds over a step."""

    name: str
    peak: int
    parts: dict[str, int]
    seconds: float


class Plan:
    """The parts of a run as loop.py holds them, on one of `ranks` GPUs, and its phases."""

    def __init__(self, config: Config, ranks: int, gpu: GPU, device: str = "meta", only: str | None = None):
        """`device`: "meta" for a GPU, "cpu" for ranks that have none. `only`: "sampling" or "training", by GPUs that do
        nothing else."""
        self.config, self.ranks, self.gpu, self.device = config, ranks, gpu, device
        self.on_gpu = device == "meta"
        rates = {torch.bfloat16: gpu.bf16_flops_per_s, torch.float32: gpu.float32_flops_per_s}
        self.ledger = ledger = Ledger(device, rates, gpu.bytes_per_s)
        self.hf_config = model_config(config.student)
        self.dtype = training_dtype(config.deepspeed)
        rl, self.zero_stage = config.rl, config.deepspeed.zero_stage
        self.teachers = rl.algorithm in ("ril", "sft")
        self.look_seconds = 0.0  # of a frozen vision tower, at a question's picture
        self.idle: dict[str, int] = {}  # bytes of what waits on the host where a phase does not need it
        self.samples, self.only = rl.algorithm != "sft", only
        self.model = fake_model(self.hf_config, ledger, self.dtype)
        referenced = self.beta > 0 and only != "sampling"
        self.reference = fake_model(self.hf_config, ledger, self.dtype) if referenced else None
        adversarial = rl.algorithm == "ril" and config.discriminator.use != "none" and only != "sampling"
        self.judged = self._discriminator() if adversarial else None
        self.decoders = [language_model(each) for each in (self.model, self.reference) if each is not None]
        self.decoders += [] if self.judged is None else [self.judged.language_model]

    def _discriminator(self) -> Discriminator:
        decoder = language_model(fake_model(self.hf_config, self.ledger, self.dtype))
        weight = decoder.norm.weight
        decoder.norm.weight = nn.Parameter(torch.ones(weight.shape))  # what kind of norm it is is read from results
        module = Discriminator(decoder, self.config.discriminator.temperature)
        decoder.norm.weight = weight
        if module.score.eps is not None:
            module.score.norm_weight = weight
        with self.ledger.fake:
            module.score.weight = nn.Parameter(torch.empty(1, len(weight), dtype=self.dtype, device=self.device))
            module.score.bias = nn.Parameter(torch.empty(1, dtype=self.dtype, device=self.device))
        return module.requires_grad_(self.config.discriminator.use == "updated")

    def phases(self, limit: int | None = None) -> list[Phase]:
        """Of a step, in their order; none where what always lives is above `limit` bytes.

        Raises:
            UserError: a setting that the loop would refuse, too.
        """
        gpu_only = as_on_gpu(self.decoders) if self.on_gpu else nullcontext()
        memory.release()
        with gpu_only, counted(self.ledger):
            try:
                return self._phases(limit)
            finally:
                memory.release()

    def _phases(self, limit: int | None) -> list[Phase]:
        config, rl, ledger = self.config, self.config.rl, self.ledger
        for decoder in self.decoders:
            adapt(decoder, rl.packing, torch.device("cuda" if self.on_gpu else "cpu"))
        tower = None if rl.train_vision_tower else vision_tower(self.model).requires_grad_(False)
        once = tower is not None and not config.deepspeed.offload_idle
        self.look = look_once(self.model) if once else None
        if self.reference is not None and once:
            look_once(self.reference)
        policy = Policy(self.model).train()
        self.weights = Weights(policy, config, ledger, self.ranks, tower)
        held = {"student": self.weights.held}
        plan = config.plan
        self.questions = Questions(self.hf_config, self.model.base_model, plan.text_tokens, plan.image_tokens)
        if self.only == "sampling":
            return [self._rollout(held)]
        student = Trained(policy, self.weights, config, ledger)
        held["optimiser"] = student.held
        reference = of_reference = of_judge = judge = None
        if self.reference is not None:
            reference = Policy(self.reference).requires_grad_(False).eval()
            of_reference = Weights(reference, self._of_frozen(), ledger, self.ranks, vision_tower(self.reference))
            held["reference"] = of_reference.held
        if self.judged is not None:
            of_judge = Weights(self.judged, config if self._updates_d else self._of_frozen(), ledger, self.ranks)
            judge = Trained(self.judged, of_judge, config, ledger) if self._updates_d else None
            held["discriminator"] = of_judge.held + (0 if judge is None else judge.held)
        if config.deepspeed.offload_idle:
            self.idle = {part: held[part] for part in ("optimiser", "reference", "discriminator") if part in held}
            if self.zero_stage == 3:  # a share of the weights stays
                self.idle |= {"reference": 0, "discriminator": 0 if judge is None else judge.held}
        if limit is not None and ledger.live - sum(self.idle.values()) > limit:
            return []
        phases = []
        if self.samples and self.only is None:
            phases.append(self._rollout(held))
        if self.judged is not None:
            phases.append(self._discriminate(judge, of_judge, held))
        phases += self._update_policy(student, reference, of_reference, held)
        for phase in phases:  # there and back, once in a step
            woken = next((part for part in AWAKE.get(phase.name, ()) if phase.name != "optimiser step"), None)
            phase.seconds += 2 * self.idle.get(woken, 0) / self.gpu.host_bytes_per_s
        return phases

    def _of_frozen(self) -> Config:
        """With stage 3 what idles and is only read has its share on the host, as engine.freeze does it."""
        settings = self.config.deepspeed
        if not settings.offload_idle or settings.zero_stage < 3:
            return self.config
        return self.config.model_copy(update={"deepspeed": settings.model_copy(update={"offload_parameters": True})})

    @property
    def _updates_d(self) -> bool:
        return self.config.discriminator.use == "updated"

    def _phase(self, name: str, held: dict[str, int], work: Callable[[], float | None]) -> Phase:
        """`work` returns how often a step does it. What waits on the host meanwhile was counted, and is taken off."""
        self.ledger.restart()
        times = work()
        away = {part: self.idle[part] for part in self.idle if part not in AWAKE.get(name, ())}
        parts = {part: size - away.get(part, 0) for part, size in held.items()}
        parts |= {OWN: self.ledger.peak - sum(held.values())}
        seconds = self.ledger.seconds * (1 if times is None else times)
        return Phase(name, self.ledger.peak - sum(away.values()), parts, seconds)

    def _exchange(self, phase: Phase, sent: float, over_host: float) -> Phase:
        """Adds the time of these bytes, sent to other GPUs and moved to or from the host."""
        seconds = sent / self.gpu.link_bytes_per_s + over_host / self.gpu.host_bytes_per_s
        # stage 3 does it while it computes
        phase.seconds = max(phase.seconds, seconds) if self.zero_stage == 3 else phase.seconds + seconds
        return phase

    @contextmanager
    def _gathered(self, held: dict[str, int], weights: Weights, count: int | None = None) -> Iterator[None]:
        with weights.gathered(count) as size:
            if size:
                held["gathered"] = size
            yield
            held.pop("gathered", None)

    def _there(self, values):
        return tree_map_only(Tensor, lambda each: each.to(self.device), values)

    def _see(self) -> float:
        """Seconds of a look at a question's picture; from the first on the prompt holds what a frozen tower saw."""
        if self.look is not None:
            self.ledger.seconds = 0.0
            self.questions.see(self.look)
            self.look_seconds, self.look = self.ledger.seconds, None
        return self.look_seconds

    def _responses(self) -> int:
        """Of a question, over student and teachers."""
        return self.config.rl.group_size * (self.samples + self.teachers)

    def _largest(self, keys: list[int], prefix: list[int], own: list[int]) -> tuple[list[int], float]:
        """The responses of this step's largest micro-batch, and how many such a rank computes."""
        rl = self.config.rl
        planned = micro_batches(rl.packing, keys, prefix, own, budget=rl.micro_batch_tokens, ranks=self.ranks)
        largest = max((part for rank in planned for part in rank), key=len)
        return largest or [0], sum(map(len, planned[0])) / max(1, len(largest))

    def _rollout(self, held: dict[str, int]) -> Phase:
        config, ledger = self.config, self.ledger
        self.model.eval()
        count = -(-config.rl.questions_per_step // self.ranks)
        tokens = self.questions.prompt({})["input_ids"].shape[1]
        group, limit = config.rl.group_size, config.sampling.max_new_tokens

        def work() -> None:
            sampler = Rollout(self.model, self.questions, config.sampling)
            sampler.graphs.keep = lambda tensors: None  # no address to keep
            before = ledger.live
            with torch.no_grad():
                looks, ledger.seconds = count * self._see(), 0.0
                prompts = [self.questions.prompt({})] * count
                sampler._prepare(prompts, group, seed=0)
                held["cache"] = ledger.live - before
                slots, _, longest, own = sampler._shape
                entering = min(slots, max(1, PREFILL_TOKENS // tokens))
                sampler._prefill([(slot, slot, prompts[0]) for slot in range(entering)], greedy=False)
                prefills = ledger.seconds * count / entering
                ledger.seconds = 0.0
                sampler.step(slots * group, longest, own, greedy=False)
            ledger.seconds = looks + prefills + ledger.seconds * limit * count / slots
            self.sampler = sampler

        with self._gathered(held, self.weights):
            phase = self._phase("rollout", held, work)
        phase.seconds += self.weights.sent / self.gpu.link_bytes_per_s
        phase.seconds += self.weights.from_host / self.gpu.host_bytes_per_s
        return phase

    def _discriminate(self, trained: Trained | None, weights: Weights, held: dict[str, int]) -> Phase:
        config, module = self.config, self.judged
        shared = CHAT_TOKENS + len(config.discriminator.instruction) // CHARACTERS_PER_TOKEN
        count = config.rl.questions_per_step * self._responses()
        length = config.sampling.max_new_tokens
        part, times = self._largest([0] * count, [shared] * count, [length] * count)
        rows = [[1] * (shared + length) for _ in part]
        inputs = self._there(discriminator_batch(rows, 0, config.rl.packing, shared))

        def work() -> float:
            labels = self._there(torch.ones(len(part), dtype=torch.bool))
            if trained is not None:
                module.train()
                with trained.backward():
                    module(*inputs, labels=labels, norm=float(count)).loss.backward()
                trained.step()
            module.eval()
            with torch.no_grad():
                module(*inputs)
            return times

        if trained is None:
            with self._gathered(held, weights, weights.to_read):
                return self._exchange(self._phase("discriminator", held, work), *_bytes(weights, times))
        with self._gathered(held, weights, weights.to_train):
            phase = self._phase("discriminator", held, work)
        return self._exchange(phase, *_bytes(weights, 3 * times, trained, times))

    def _update_policy(
        self, student: Trained, reference: Policy | None, of_reference: Weights | None, held: dict[str, int]
    ) -> list[Phase]:
        config, rl = self.config, self.config.rl
        # Questions that this rank trains on and has not sampled: of one rank none, else it may be all.
        looks = self._see() * -(-rl.questions_per_step // self.ranks)
        looks *= self.ranks > 1 or not self.samples or self.only is not None
        each = self._responses()
        keys = [slot for slot in range(rl.questions_per_step) for _ in range(each)]
        prompt = self.questions.prompt({})["input_ids"].shape[1]
        length = config.sampling.max_new_tokens
        part, times = self._largest(keys, [prompt] * len(keys), [length] * len(keys))
        questions = {slot: {"id": slot} for slot in set(keys)}
        batch = self.questions.batch([questions[keys[i]] for i in part], [[1] * length for _ in part], rl.packing)
        batch = replace(
            batch, inputs=self._there(batch.inputs), row=self._there(batch.row), target=self._there(batch.target)
        )
        settings = {"advantages": torch.linspace(-1, 1, len(part)), "norm": float(len(part)), "beta": self.beta}
        phases = []

        def refer() -> float:
            with torch.no_grad():
                settings["reference_logprobs"] = reference(batch)
            return times

        def update() -> float:
            student.module.train()
            with student.backward():
                loss, _ = student.module(batch, **settings)
                loss.backward()
            return times * rl.updates_per_step

        if reference is not None:
            with self._gathered(held, of_reference, of_reference.to_read):
                phase = self._phase("reference", held, refer)
            phases.append(self._exchange(phase, *_bytes(of_reference, times)))
        updates, weights = rl.updates_per_step, self.weights
        with self._gathered(held, weights, weights.to_train):
            phase = self._phase("policy", held, update)
        phase.seconds += looks
        phases.append(self._exchange(phase, *_bytes(weights, 2 * times * updates)))
        phase = self._phase("optimiser step", held, lambda: student.step() or updates)
        phases.append(self._exchange(phase, updates * student.sent(times), updates * student.over_host(times)))
        return phases

    @property
    def beta(self) -> float:
        return self.config.rl.beta if self.config.rl.algorithm != "sft" else 0.0


def _bytes(weights: Weights, gathers: float, trained: Trained | None = None, micro_batches: float = 0.0):
    """Sent to other GPUs, and moved to or from the host."""
    sent, over_host = gathers * weights.sent, gathers * weights.from_host
    if trained is not None:
        sent, over_host = sent + trained.sent(micro_batches), over_host + trained.over_host(micro_batches)
    return sent, over_host


def alternatives(config: Config) -> list[tuple[str, Config]]:
    """Settings that need less memory, each on top of those before it, as `--set` takes them."""
    out, said = [], {}

    def change(section: str, name: str, value: object) -> None:
        nonlocal config
        tree = config.model_dump()
        tree[section][name] = value
        try:
            config = Config.model_validate(tree)
        except ValueError:  # such as a cache that does not hold one question
            return
        said[f"{section}.{name}"] = str(value).lower()
        out.append((" ".join(f"{key}={text}" for key, text in said.items()), config))

    if not config.deepspeed.bf16:
        change("deepspeed", "bf16", True)
    if config.deepspeed.zero_stage < 2:
        change("deepspeed", "zero_stage", 2)
    if config.rl.packing == "padded":
        change("rl", "packing", "shared")
    for tokens in (4096, 2048):
        if tokens < config.rl.micro_batch_tokens:
            change("rl", "micro_batch_tokens", tokens)
    change("sampling", "cache_tokens", config.sampling.cache_tokens // 4)
    if not config.deepspeed.gradient_checkpointing:
        change("deepspeed", "gradient_checkpointing", True)
    if config.deepspeed.zero_stage < 3:
        change("deepspeed", "zero_stage", 3)
    settings = config.deepspeed
    if not (settings.offload_idle or settings.offload_optimizer or settings.offload_parameters):
        change("deepspeed", "offload_idle", True)
    return out


def plan(config: Config, *, gpus: int, gpu_memory_gib: float, gpu: str) -> dict:
    """What `ril plan` prints: the phases of a step on each of `gpus` GPUs, whether they fit, and what would.

    Raises:
        UserError: a GPU that is not in the table, or a config that the loop would refuse.
    """
    if config.rl.lora is not None:
        raise UserError(
            "rl.lora is set, and plans know no adapters yet: plan without, which takes more memory: --set rl.lora=null"
        )
    board, limit = gpu_named(gpu), int(gpu_memory_gib * 2**30)
    phases = Plan(config, gpus, board).phases()
    peak = max(phases, key=lambda phase: phase.peak)
    result = {"gpu": gpu, "gpus": gpus, "gpu_memory_gib": gpu_memory_gib, "peak_gib": round(peak.peak / 2**30, 2)}
    result |= {"peak_phase": peak.name, "fits": peak.peak <= limit}
    result["step_s"] = round(sum(phase.seconds for phase in phases), 3)
    result["phases"] = [asdict(phase) for phase in phases]
    result["would_fit"] = None
    if not result["fits"]:
        tried = alternatives(config)
        first = bisect_left(tried, True, key=lambda each: _fits(each[1], gpus, board, limit))
        result["would_fit"] = tried[first][0] if first < len(tried) else None
    return result


def _fits(config: Config, gpus: int, board: GPU, limit: int) -> bool:
    try:
        phases = Plan(config, gpus, board).phases(limit)
    except UserError:  # a student that reads no packs
        return False
    return bool(phases) and max(each.peak for each in phases) <= limit
