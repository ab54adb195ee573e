"""TRL 1.16's trainers with `token_logprob`: one call after the trainer is built.

    trainer = GRPOTrainer(...)
    use_fused_logprob(trainer)

B sequences, S padded length, H hidden, R scored tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from functools import wraps
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ril_engine.rollout.response import seed_of
from ril_engine.teachers import divide
from ril_kernels import token_logprob

OUTPUTS = {"log_probs", "entropy"}
D_FOLDER = "discriminator"


def use_fused_logprob(trainer) -> None:
    """Let a trainer's models score tokens by `ril_kernels.token_logprob`: GRPOTrainer, RLOOTrainer, and others whose
    loss needs no more than log-probs and entropies. Generation and everything else stay as they are.

    On a CPU only response tokens meet the vocabulary head (TRL's own form takes every position there); on a GPU, as in
    TRL's. Under DeepSpeed's ZeRO-3 the head's weight is gathered for forward and backward by its own module's hooks.

    Args:
        trainer: made, not yet trained; its reference model, if it has one, changes too.

    Raises:
        TypeError: its model has no fused head of TRL's (`add_fused_lm_head`).
        ValueError: its loss reads more of the distribution than log-probs and entropies.
    """
    accelerator, models = trainer.accelerator, [trainer.model, getattr(trainer, "ref_model", None)]
    for each in (each for each in models if each is not None):
        model = accelerator.unwrap_model(each)
        within = vars(model).pop("_original_forward", None)  # the mixed precision that a reference has from the start
        if within is not None:
            model.forward = within
        use_fused_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
        if within is not None:
            accelerator.prepare_model(model, evaluation_mode=True)


def use_fused_head(model: nn.Module) -> None:
    """`use_fused_logprob` for one model, after TRL's `add_fused_lm_head`; raises as it does."""
    theirs = model.forward
    settings = inspect.getclosurevars(theirs.__func__).nonlocals if inspect.ismethod(theirs) else {}
    if "final_logit_softcapping" not in settings:
        raise TypeError(
            f"model: got a {type(model).__name__} whose forward is {theirs.__qualname__}, expected one with TRL 1.16's "
            "fused head. Call this once, after the trainer is built."
        )
    if extra := sorted(set(settings["outputs"]) - OUTPUTS):
        raise ValueError(
            f"model: its trainer's loss reads {' and '.join(extra)}, expected log_probs and entropy alone. Leave this "
            "trainer as it is."
        )

    @wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        head = self.get_output_embeddings()
        ours = fused_lm_head and not isinstance(head.weight, DTensor) and not kwargs.get("output_router_logits")
        if not ours:  # FSDP2 and losses of experts' routers are left to TRL
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None}
            return theirs(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        hidden = getattr(self, settings["backbone_attr"])(*args, **kwargs | {"use_cache": False}).last_hidden_state
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        return _scored(hidden, head, shift_labels, num_items_in_batch, settings)

    model.forward = MethodType(forward, model)


def _scored(hidden: Tensor, head: nn.Module, labels: Tensor, num_items: Tensor | int | None, settings: dict):
    """TRL's output for states (B, S, H) and the token that each predicts (B, S), -100 where none is scored."""
    from trl.trainer.utils import FusedCausalLMOutput

    hidden, labels = hidden.to(head.weight.device), labels.to(head.weight.device)
    mask, device = labels != -100, hidden.device.type
    rows = mask.flatten().nonzero().squeeze(1)
    rows = rows if len(rows) else rows.new_zeros(1)  # one that does not count, so that the loss has a graph
    target = labels.flatten()[rows]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    dtype = torch.float32 if settings["cast_lm_head_to_fp32"] else dtype
    scale, entropies = settings["logit_scale"], "entropy" in settings["outputs"]

    def fused(self, states: Tensor) -> tuple[Tensor, Tensor]:  # (R, H) -> (R,), (R,)
        bias = None if self.bias is None else (self.bias * scale).to(dtype)
        options = {"bias": bias, "temperature": settings["temperature"], "softcap": settings["final_logit_softcapping"]}
        weight = self.weight.to(dtype)
        return token_logprob((states * scale).to(dtype), weight, target, **options, return_entropy=True)

    exact = torch.autocast(device, enabled=False) if settings["cast_lm_head_to_fp32"] else nullcontext()
    with _forward_of(head, fused), exact:
        values = head(hidden.flatten(0, 1)[rows])
    spread = [value.new_zeros(mask.numel()).index_copy(0, rows, value).view(mask.shape) for value in values]
    count = mask.sum().clamp(min=1) if num_items is None else num_items
    return FusedCausalLMOutput(
        loss=-spread[0].sum() / count,
        log_probs=spread[0],
        entropy=spread[1] if entropies else None,
        label_mask=mask,
    )


@contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within it a call of the module runs `forward`, between its own hooks: under ZeRO-3 they gather its weight, then
    and for the backward."""
    own = module.__dict__.get("forward")
    module.forward = MethodType(forward, module)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class RILMixin:
    """RIL in TRL's GRPOTrainer: `class RILTrainer(RILMixin, GRPOTrainer): pass`.

    Half of each group's `num_generations` completions are teachers' texts, drawn without replacement from the dataset's
    column `teacher_responses`: a list of texts for each question, or a list of lists, one for each teacher, which share
    alike. The student generates the other half. The last reward function is D's similarity reward, after D's update on
    the step's texts (arXiv 2510.19307, Algorithm 2), so `reward_weights` has one number more. All of a step go to D
    together: `steps_per_generation` and the batch size say how many those are. D is kept in the trainer's checkpoints.

    RIL's policy update is `loss_type="dr_grpo", scale_rewards="none", use_bias_correction_kl=False` with `beta` > 0.
    TRL's KL covers teachers' tokens as well, where the engine's `rl.kl_on` has the student's alone by default.

    Args of the constructor, besides GRPOTrainer's:
        adversary: `ril_engine.adversary.Adversary`, D with the engine that trains it.
    """

    def __init__(self, *args, adversary, reward_funcs=(), **kwargs):
        self._adversary = adversary
        funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        super().__init__(*args, reward_funcs=[*funcs, self.similarity], **kwargs)
        group, batch = self.num_generations, self.args.per_device_train_batch_size * self.args.steps_per_generation
        if group % 2 or batch % group:
            raise ValueError(
                f"num_generations: got {group} and {batch} completions of a process, expected an even number that "
                "divides them. Half of a group's completions are teachers'; change one of the two."
            )

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        self._rows = inputs
        return super()._generate_and_score_completions(inputs)

    def _is_teachers(self, i: int) -> bool:
        return self.model.training and i % self.num_generations >= self.num_generations // 2

    def _generate(self, prompts: list) -> tuple:
        if not self.model.training:
            return super()._generate(prompts)
        group = self.num_generations
        own = [i for i in range(len(prompts)) if not self._is_teachers(i)]
        self.num_generations = group // 2
        try:
            made = super()._generate([prompts[i] for i in own])
        finally:
            self.num_generations = group
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra, images, tool_images = made
        for start in range(0, len(prompts), group):
            place = start + group // 2
            texts, ids = zip(*map(self._response, self._teachers(start, group // 2)), strict=True)
            for values in (prompt_ids, images, tool_images):
                if values:
                    values[place:place] = [values[start]] * len(texts)
            completion_ids[place:place] = ids
            talk = isinstance(completions[start], list)
            completions[place:place] = [[{"role": "assistant", "content": t}] if talk else t for t in texts]
            if logprobs is not None:  # nobody sampled these
                logprobs[place:place] = [[None] * len(each) for each in ids]
            if tool_mask is not None:
                tool_mask[place:place] = [[1] * len(each) for each in ids]
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra, images, tool_images

    def _teachers(self, start: int, count: int) -> list[str]:
        """Of the group that starts there. What is drawn is another draw for each group, process and step."""
        found = self._rows[start].get("teacher_responses") or []
        pools = [found] if all(isinstance(each, str) for each in found) else found
        pools = {str(number): texts for number, texts in enumerate(pools)}
        available = {name: len(texts) for name, texts in pools.items()}
        if sum(available.values()) < count:
            raise ValueError(
                f"teacher_responses: got {sum(available.values())} texts for a question, expected at least {count}, "
                "half of num_generations. Add more to the dataset or lower num_generations."
            )
        parts = (self.args.seed, self.state.global_step, self.accelerator.process_index, start)
        generator = torch.Generator().manual_seed(seed_of(*parts))
        chosen = []
        for name, some in divide(count, dict.fromkeys(pools, Fraction(1)), available, generator).items():
            picks = torch.randperm(available[name], generator=generator)[:some]
            chosen += [pools[name][i] for i in picks.tolist()]
        return chosen

    def _response(self, text: str) -> tuple[str, list[int]]:
        """A teacher's text as the student would have written it: no special token but the EOS at its end; cut at the
        limit, and without an EOS then."""
        special, limit = set(self._tokenizer.all_special_ids), self.max_completion_length
        ids = [i for i in self._tokenizer(text, add_special_tokens=False)["input_ids"] if i not in special]
        if len(ids) < limit:
            return text, [*ids, self._tokenizer.eos_token_id]
        return self._tokenizer.decode(ids[:limit]), ids[:limit]

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self._adversary.engine is not None:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            self._adversary.engine.save(folder / D_FOLDER)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._adversary.engine is not None:
            if not (folder := Path(checkpoint) / D_FOLDER).exists():
                raise ValueError(
                    f"resume_from_checkpoint: got {checkpoint}, which has no {D_FOLDER}, expected a checkpoint of a "
                    "RIL trainer. Start a new run."
                )
            self._adversary.engine.load(folder)

    def similarity(self, prompts: list, completions: list, completion_ids: list, **columns) -> list[float | None]:
        """D's reward for each completion; all processes call it together."""
        from accelerate.utils import gather_object

        texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
        rank, group = self.accelerator.process_index, self.num_generations
        mine = [
            {"source": "teacher" if self._is_teachers(i) else "student", "text": text, "ids": ids}
            | {"slot": rank * len(texts) + i // group}
            for i, (text, ids) in enumerate(zip(texts, completion_ids, strict=True))
        ]
        if not self.model.training:  # no teachers then, whom D could tell the student from
            return [None] * len(mine)
        every = gather_object(mine)
        self._adversary.wake()
        metrics = self._adversary.update(every)
        self._adversary.rest()
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        start = rank * len(mine)
        return [each["similarity_reward"] for each in every[start : start + len(mine)]]
