"""step: a whole training step. (a) RL alone, against TRL's GRPOTrainer; (b) RIL, against the straightforward one.

The student is a 15M Qwen2.5-VL with its vision tower frozen, trained by AdamW: Q questions with a picture, P prompt
tokens, G answers each of R tokens (no end is drawn), the reference on. In (b) each group has as many answers of a
teacher, and D learns and scores. `phase_share` says where a candidate's time goes; `tokens` are the positions that it
runs through the language models, a forward with its backward counted once.

On a CPU all is float32. On a GPU it is bfloat16 as each has it: TRL's mixed precision casts float32 weights in every
forward, ours reads bfloat16 weights that AdamW keeps in float32, too, and the straightforward one has bfloat16 alone,
which is less work and would lose small updates. Our engine takes Liger's kernels there; its rotary embedding replaces
that of the whole family, so the others run it as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import step_task
from benchmarks.case import Case
from benchmarks.packing_cases import without_graphs
from benchmarks.step_peers import PlainRIL, TRLStep
from benchmarks.step_task import Found, Phases, Task, forget
from ril_engine import digits
from ril_engine.adversary import WEIGHTS
from ril_engine.discriminator import new_discriminator
from ril_engine.families import language_model
from ril_engine.loop import Loop
from ril_engine.runlog import PhaseTimer

TRL, RIL, PLAIN = "TRL GRPOTrainer", "ril_engine", "straightforward"


class OurStep:
    """Loop.step, as train.py runs it."""

    def __init__(self, loop: Loop, rows: list[dict]):
        self.loop, self.questions, self.number, self.phases = loop, list(enumerate(rows)), 0, Phases()
        self.decoders = [language_model(each.model) for each in (loop.policy, loop.reference)]
        self.decoders += [loop.adversary.module.language_model] if loop.adversary is not None else []

    def __call__(self) -> None:
        forget(self.loop.encoder)
        with self.phases.step("other"):
            self.loop.step(self.number, self.questions, self.phases.timer)
        self.number += 1


def rl_case(num_tokens: int, picture: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    task = Task(num_tokens, picture, step_task.QUESTIONS, dtype, device)
    theirs, fused = TRLStep(task, fused=False), TRLStep(task, fused=True)
    loop = task.loop("dr_grpo", step_task.SAMPLES, {}, None)  # joins a job of one, which TRL would take notice of
    inputs = theirs.recorded()
    found = {TRL: theirs.found(inputs), f"{TRL} with ril_kernels": fused.found(inputs)}
    found[RIL] = found_by(loop, task.rows, inputs)
    steps = {TRL: theirs, f"{TRL} with ril_kernels": fused, RIL: OurStep(loop, task.rows)}
    return case_of("RL alone", num_tokens, step_task.SAMPLES, dtype, steps, found)


def found_by(loop: Loop, rows: list[dict], inputs: dict) -> Found:
    """What we make of TRL's roll-outs, with one update at a rate that changes nothing."""
    responses = []
    for i, (ids, mask) in enumerate(zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)):
        row = rows[i // step_task.SAMPLES]
        ids = ids[mask.bool()].tolist()
        one = {"slot": i // step_task.SAMPLES, "row": row, "source": "student", "ids": ids, "truncated": False}
        one |= {"sampler_logprobs": [0.0] * len(ids), "prompt_tokens": loop.encoder.prompt(row)["input_ids"].shape[1]}
        responses.append(one)
    metrics = loop.update_policy(responses, inputs["advantages"].float().cpu(), PhaseTimer())
    return metrics["loss/policy"], metrics["grad_norm/student"]


def ril_case(num_tokens: int, picture: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    from safetensors.torch import save_file

    task = Task(num_tokens, picture, step_task.QUESTIONS, dtype, device)
    group = step_task.SAMPLES // 2
    corpus = [text for text in digits.corpus() if len(text.split()) > 6]
    saved = {
        "other": {
            row["id"]: [
                {"source": "other", "text": " ".join(corpus[i : i + 2]), "truncated": False, "answer_reward": 1.0}
                for i in range(2 * group)
            ]
            for row in task.rows
        }
    }
    d_path = task.folder / "d"
    d_path.mkdir()
    module, _ = new_discriminator(task.config(rl={"algorithm": "dr_grpo"}).student)
    save_file({name: value.clone() for name, value in module.state_dict().items()}, d_path / WEIGHTS)
    teachers = [{"name": "other", "path": "tiny:qwen_teacher"}]
    loop = task.loop("ril", group, saved, d_path, teachers=teachers)
    plain = PlainRIL(task, loop, saved)
    steps = {PLAIN: plain, RIL: OurStep(loop, task.rows)}
    responses = loop.rollout(0, list(enumerate(task.rows)))
    advantages = torch.linspace(-0.1, 0.1, len(responses))
    ours = loop.update_policy(responses, advantages, PhaseTimer())
    found = {PLAIN: plain.update(responses, advantages), RIL: (ours["loss/policy"], ours["grad_norm/student"])}
    return case_of("RIL", num_tokens, f"{group}+{group}", dtype, steps, found)


def positions(step: Callable[[], None]) -> int:
    """What a step runs through the first layer of its language models."""
    seen = 0

    def count(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal seen
        states = args[0] if args else kwargs["hidden_states"]
        seen += states.shape[:-1].numel()

    hooks = [each.layers[0].register_forward_pre_hook(count, with_kwargs=True) for each in step.decoders]
    with without_graphs():
        step()
    for hook in hooks:
        hook.remove()
    return seen


def case_of(
    kind: str, num_tokens: int, group: int | str, dtype: torch.dtype, steps: dict, found: dict[str, Found]
) -> Case:
    """A candidate's output is its loss of the same roll-outs, over beta, so that its KL counts as nats, and the norm of
    its gradient; both must be the baseline's."""
    tokens = {name: positions(step) for name, step in steps.items()}

    def candidate(step: Callable[[], None], name: str) -> Tensor:
        with torch.enable_grad():
            step()
        loss, norm = found[name]
        return torch.tensor([loss / step_task.BETA, norm], dtype=dtype)

    return Case(
        "step",
        f"step {kind} P={num_tokens} R={step_task.LENGTH} Q={step_task.QUESTIONS} G={group}",
        {},
        {name: partial(candidate, step, name) for name, step in steps.items()},
        {},
        "",
        tokens=tokens,
        max_rounds=step_task.ROUNDS,
        notes={name: step.phases.note for name, step in steps.items()},
        dtype=dtype,
        tolerance=step_task.TOLERANCE[dtype],
    )


def all_cases(dtype: torch.dtype, device: str, full: bool) -> list[tuple[str, str, Callable[[], Case]]]:
    all_of_them = full or device == "cuda"
    lengths, long = ((64, 256), (256, 1024)) if all_of_them else ((64,), ())  # TRL's step takes seconds on a CPU
    rl = [("step", f"RL alone P={num}", partial(rl_case, num, step_task.SIZES[num], dtype, device)) for num in lengths]
    return rl + [("step", f"RIL P={num}", partial(ril_case, num, step_task.SIZES[num], dtype, device)) for num in long]
