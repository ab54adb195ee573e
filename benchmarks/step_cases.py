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

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.case import Case
from benchmarks.packing_cases import without_graphs
from ril_engine import digits, tiny_models
from ril_engine.adversary import WEIGHTS
from ril_engine.config import Config
from ril_engine.discriminator import discriminator_batch, encode_for_discriminator, load_decoder, new_discriminator
from ril_engine.engine import device as engine_device
from ril_engine.engine import init_distributed
from ril_engine.errors import UserError
from ril_engine.families import language_model
from ril_engine.loop import Loop
from ril_engine.models import Encoder, load
from ril_engine.placement import to_device
from ril_engine.runlog import PhaseTimer
from ril_kernels import group_advantages, policy_loss, token_bits
from ril_kernels.token_logprob.reference import token_logprob_reference

PATCH = 28  # pixels of a side of what becomes one token
# P -> tokens of the picture (rows, columns)
SIZES = {64: (4, 7), 256: (14, 14), 1024: (28, 32)}
QUESTIONS, SAMPLES, LENGTH, ROUNDS = 2, 8, 32, 3
HIDDEN, LAYERS, VOCABULARY = 448, 4, 8192
BETA, RATE = 0.04, 1e-6
TRL, RIL, PLAIN = "TRL GRPOTrainer", "ril_engine", "straightforward"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
Found = tuple[float, float]  # loss, norm of its gradient


class Task:
    """Checkpoint, pictures and questions of exactly P tokens, in a folder of its own, and where and in which dtype all
    candidates run."""

    def __init__(self, num_tokens: int, picture: tuple[int, int], questions: int, dtype: torch.dtype, device: str):
        if engine_device().type != device:
            raise UserError(
                f"--device {device}: DeepSpeed would run on {engine_device().type}; set DS_ACCELERATOR={device}"
            )
        self.dtype, self.device, self.bf16 = dtype, torch.device(device), dtype == torch.bfloat16
        self.folder = Path(tempfile.mkdtemp(prefix="step-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.student = str(self.folder / "student")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, processor = tiny_models._qwen2_5_vl(HIDDEN, LAYERS, digits.corpus())
            model.resize_token_embeddings(VOCABULARY)
        for each in (processor.image_processor, processor.video_processor):
            each.size = {"shortest_edge": PATCH**2, "longest_edge": 2**20}
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        model.save_pretrained(self.student)
        processor.save_pretrained(self.student)
        self.rows = [self._row(number, picture, num_tokens, processor) for number in range(questions)]

    def _row(self, number: int, picture: tuple[int, int], num_tokens: int, processor) -> dict:
        from PIL import Image

        generator = torch.Generator().manual_seed(number)
        noise = torch.randint(256, (PATCH * picture[0], PATCH * picture[1], 3), generator=generator, dtype=torch.uint8)
        name = f"{number}.png"
        Image.fromarray(noise.numpy()).save(self.folder / name)
        with Image.open(self.folder / name) as image:
            for text in ("What" + " the" * count + end for count in range(num_tokens) for end in ("", "?")):
                messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                if len(processor(text=[rendered], images=[image])["input_ids"][0]) == num_tokens:
                    break
            else:
                raise ValueError(f"no question of {num_tokens} tokens with a picture of {picture}")
        return {"id": str(number), "question": text, "answer": "7", "image": name, "kind": "left"}

    def config(self, **changes) -> Config:
        settings = {
            "work_dir": self.folder / "runs",
            "student": {"path": self.student},
            "deepspeed": {"bf16": self.bf16},
            "data": {"dir": str(self.folder)},
            "sampling": {"max_new_tokens": LENGTH, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
        }
        return Config.model_validate(settings | changes)

    def loop(self, algorithm: str, group: int, saved: dict, d_path: Path | None, **changes) -> Loop:
        init_distributed()
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, also where a job of one was there before
        rl = {"algorithm": algorithm, "questions_per_step": len(self.rows), "group_size": group, "beta": BETA}
        loop = Loop(self.config(rl=rl | {"learning_rate": RATE}, **changes), self.folder, self.student, saved, d_path)
        encoder = loop.encoder
        banned = token_bits(torch.tensor(encoder.banned_ids + encoder.eos_ids), VOCABULARY)
        loop.sampler.banned = banned.to(self.device)
        sharpened(loop.reference.model)
        return loop


class Phases:
    """Seconds by phase over all steps, as shares in `note`. The host waits for a GPU where a phase begins and ends."""

    def __init__(self) -> None:
        self.timer, self.seconds, self.note = PhaseTimer(), Counter(), {}

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self.timer.phase(name)

    @contextmanager
    def step(self, rest: str) -> Iterator[None]:
        """A step; `rest` is what no other phase in it has."""
        self.timer.pop()
        with self(rest):
            yield
        self.seconds.update(self.timer.pop())
        whole = self.seconds["step"]
        self.note["phase_share"] = {name: value / whole for name, value in self.seconds.items() if name != "step"}


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


def forget(encoder: Encoder) -> None:
    """Each step of an epoch has new questions: their pictures are read and looked at in it."""
    encoder._prompts.clear()
    encoder._cached_bytes = 0


def frozen(model: nn.Module) -> nn.Module:
    model.model.visual.requires_grad_(False)
    return model


def sharpened(reference: nn.Module) -> None:
    """Larger logits: the KL to a reference that equals the student is 0, and the loss of its own roll-outs then says
    nothing of log-probs."""
    language_model(reference).norm.weight.data *= 1.5


class TRLStep:
    """A step of TRL's own trainer on the same questions: its methods in the order of its `train`."""

    def __init__(self, task: Task, fused: bool):
        from datasets import Dataset
        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from trl import GRPOConfig, GRPOTrainer

        from ril_engine.integrations.trl import use_fused_logprob

        tokenizer = AutoProcessor.from_pretrained(task.student).tokenizer
        banned = [*tokenizer.added_tokens_decoder, *range(len(tokenizer), VOCABULARY)]
        arguments = GRPOConfig(
            output_dir=str(task.folder / "trl"),
            use_cpu=task.device.type == "cpu",
            bf16=task.bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(task.rows) * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=LENGTH,
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=BETA,
            use_bias_correction_kl=False,  # TRL 1.16's default gives the same loss another gradient
            learning_rate=RATE,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            generation_kwargs={"suppress_tokens": banned},
            report_to="none",
            disable_tqdm=True,
        )
        columns = {
            "prompt": [[{"role": "user", "content": row["question"]}] for row in task.rows],
            "image": [Image.open(task.folder / row["image"]).convert("RGB") for row in task.rows],
        }
        self.trainer = trainer = GRPOTrainer(
            model=frozen(AutoModelForImageTextToText.from_pretrained(task.student)),
            processing_class=AutoProcessor.from_pretrained(task.student),
            reward_funcs=lambda completions, **_: [float("7" in each[0]["content"]) for each in completions],
            args=arguments,
            train_dataset=Dataset.from_dict(columns),
        )
        if fused:
            use_fused_logprob(trainer)
        trainer.model = trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)  # mixed precision
        sharpened(trainer.ref_model)
        trainer.current_gradient_accumulation_steps = 1
        self.decoders = [language_model(each) for each in (trainer.model, trainer.ref_model)]
        self.optimizer = trainer.create_optimizer()
        self.batch = [trainer.train_dataset[i] for i in range(len(task.rows)) for _ in range(SAMPLES)]
        self.phases = Phases()
        for name, phase in (("_generate", "rollout"), ("_get_per_token_logps_and_entropies", "log-probs")):
            setattr(trainer, name, self._timed(getattr(trainer, name), phase))

    def _timed(self, method: Callable, phase: str) -> Callable:
        def timed(*args, **kwargs):
            name = phase if phase == "rollout" else "policy forward" if torch.is_grad_enabled() else "reference"
            with self.phases(name):
                return method(*args, **kwargs)

        return timed

    def __call__(self) -> None:
        with self.phases.step("backward and the rest"):
            self.trainer.model.train()
            self.trainer.training_step(self.trainer.model, list(self.batch), None)
            torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def recorded(self) -> dict:
        """Roll-outs with all that the loss reads of them."""
        return self.trainer.model.train() and self.trainer._generate_and_score_completions(list(self.batch))

    def found(self, inputs: dict) -> Found:
        """TRL's loss of these roll-outs, and the norm of its gradient."""
        loss = self.trainer._compute_loss(self.trainer.model.train(), inputs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


def rl_case(num_tokens: int, picture: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    task = Task(num_tokens, picture, QUESTIONS, dtype, device)
    theirs, fused = TRLStep(task, fused=False), TRLStep(task, fused=True)
    loop = task.loop("dr_grpo", SAMPLES, {}, None)  # joins a job of one, which TRL would take notice of
    inputs = theirs.recorded()
    found = {TRL: theirs.found(inputs), f"{TRL} with ril_kernels": fused.found(inputs)}
    found[RIL] = found_by(loop, task.rows, inputs)
    steps = {TRL: theirs, f"{TRL} with ril_kernels": fused, RIL: OurStep(loop, task.rows)}
    return case_of("RL alone", num_tokens, SAMPLES, dtype, steps, found)


def found_by(loop: Loop, rows: list[dict], inputs: dict) -> Found:
    """What we make of TRL's roll-outs, with one update at a rate that changes nothing."""
    responses = []
    for i, (ids, mask) in enumerate(zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)):
        row = rows[i // SAMPLES]
        ids = ids[mask.bool()].tolist()
        one = {"slot": i // SAMPLES, "row": row, "source": "student", "ids": ids, "truncated": False}
        one |= {"sampler_logprobs": [0.0] * len(ids), "prompt_tokens": loop.encoder.prompt(row)["input_ids"].shape[1]}
        responses.append(one)
    metrics = loop.update_policy(responses, inputs["advantages"].float().cpu(), PhaseTimer())
    return metrics["loss/policy"], metrics["grad_norm/student"]


class PlainRIL:
    """A step of RIL as a first implementation has it: Hugging Face's generate with a row per answer, padded forwards
    with the head on response positions only, eager losses, D's whole decoder with its final norm on all positions."""

    def __init__(self, task: Task, loop: Loop, saved: dict):
        self.loop, self.rows, self.saved = loop, task.rows, saved  # its settings, none of its models
        self.device = task.device
        (model, processor), (reference, _) = (load(loop.config.student, task.dtype) for _ in range(2))
        model, reference = model.to(task.device), reference.to(task.device)
        self.encoder = Encoder(model, processor, task.folder, loop.config.data.max_image_pixels)
        self.model, self.reference = frozen(model), reference.requires_grad_(False).eval()
        sharpened(self.reference)
        self.decoder = load_decoder(loop.config.student, task.dtype).to(task.device)
        self.score = nn.Linear(self.decoder.config.hidden_size, 1, device=task.device, dtype=task.dtype)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, betas=(0.9, 0.95))
        self.d_optimizer = torch.optim.AdamW([*self.decoder.parameters(), *self.score.parameters()], lr=1e-6)
        self.phases, self.number = Phases(), 0
        self.decoders = [language_model(self.model), language_model(self.reference), self.decoder]

    def __call__(self) -> None:
        forget(self.encoder)
        with self.phases.step("policy"):
            self.step(self.loop.config.rl.group_size)

    def step(self, group: int) -> None:
        encoder = self.encoder
        with self.phases("rollout"), torch.no_grad():
            each = [row for row in self.rows for _ in range(group)]
            inputs = to_device(encoder.prompts(each), self.device)
            settings = {"max_new_tokens": LENGTH, "do_sample": True, "top_k": 0, "pad_token_id": encoder.pad_id}
            banned = encoder.banned_ids + encoder.eos_ids
            out = self.model.eval().generate(**inputs, **settings, suppress_tokens=banned, eos_token_id=None)
            drawn = out[:, inputs["input_ids"].shape[1] :].tolist()
        own = [
            {"slot": i // group, "row": row, "source": "student", "ids": ids, "text": encoder.decode(ids)}
            for i, (row, ids) in enumerate(zip(each, drawn, strict=True))
        ]
        responses = []
        for slot, row in enumerate(self.rows):
            responses += own[slot * group : (slot + 1) * group]
            responses += self.loop._teachers(self.number, slot, slot, row)
        self.number += 1
        with self.phases("judge"):
            scores = self.loop.rewards.score([r["row"] for r in own], [r["text"] for r in own], [True] * len(own))
            for response, score in zip(own, scores, strict=True):
                response["answer_reward"] = score.reward
        with self.phases("discriminator"):
            self.discriminate(responses)
        rewards = torch.tensor([each["answer_reward"] + each["similarity_reward"] for each in responses])
        groups = torch.tensor([each["slot"] for each in responses])
        self.update(responses, group_advantages(rewards, groups, kind="dr_grpo"))

    def discriminate(self, responses: list[dict]) -> None:
        tokenizer, instruction = self.loop.adversary.tokenizer, self.loop.config.discriminator.instruction
        rows = encode_for_discriminator(tokenizer, instruction, [each["text"] for each in responses])
        inputs, last = to_device(discriminator_batch(rows, tokenizer.pad_token_id), self.device)
        labels = torch.tensor([float(each["source"] == "student") for each in responses], device=self.device)

        def logits() -> Tensor:
            states = self.decoder(**inputs, use_cache=False).last_hidden_state
            return self.score(states.flatten(0, 1)[last])[:, 0].float()

        nn.functional.binary_cross_entropy_with_logits(logits(), labels).backward()
        self.d_optimizer.step()
        self.d_optimizer.zero_grad()
        with torch.no_grad():
            for each, logit in zip(responses, logits().tolist(), strict=True):
                each["similarity_reward"] = float(logit < 0)

    def update(self, responses: list[dict], advantages: Tensor) -> Found:
        """One update of the student."""
        encoder, count = self.encoder, len(responses)
        students = torch.tensor([each["source"] == "student" for each in responses])
        own = [each for each in responses if each["source"] == "student"]
        with self.phases("reference"), torch.no_grad():
            batch = encoder.batch([each["row"] for each in own], [each["ids"] for each in own]).to(self.device)
            states = self.reference.base_model(**batch.inputs, use_cache=False).last_hidden_state
            known = token_logprob_reference(
                states.flatten(0, 1)[batch.row], self.reference.lm_head.weight, batch.target, bias=None
            )[0]
        batch = encoder.batch([each["row"] for each in responses], [each["ids"] for each in responses]).to(self.device)
        on_student = students[batch.response_index]
        reference = known.new_zeros(len(batch.target)).masked_scatter(on_student.to(self.device), known)
        states = self.model.train().base_model(**batch.inputs, use_cache=False).last_hidden_state
        loss, _ = policy_loss(
            states.flatten(0, 1)[batch.row],
            self.model.lm_head.weight,
            batch.target,
            response_index=batch.response_index,
            advantages=advantages,
            norm=float(count * LENGTH),
            beta=BETA,
            reference_logprobs=reference,
            kl_mask=on_student,
            kl_norm=float(len(own) * LENGTH),
            backend="reference",
        )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)


def ril_case(num_tokens: int, picture: tuple[int, int], dtype: torch.dtype, device: str) -> Case:
    from safetensors.torch import save_file

    task = Task(num_tokens, picture, QUESTIONS, dtype, device)
    group = SAMPLES // 2
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
        return torch.tensor([loss / BETA, norm], dtype=dtype)

    return Case(
        "step",
        f"step {kind} P={num_tokens} R={LENGTH} Q={QUESTIONS} G={group}",
        {},
        {name: partial(candidate, step, name) for name, step in steps.items()},
        {},
        "",
        tokens=tokens,
        max_rounds=ROUNDS,
        notes={name: step.phases.note for name, step in steps.items()},
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
    )


def all_cases(dtype: torch.dtype, device: str, full: bool) -> list[tuple[str, str, Callable[[], Case]]]:
    all_of_them = full or device == "cuda"
    lengths, long = ((64, 256), (256, 1024)) if all_of_them else ((64,), ())  # TRL's step takes seconds on a CPU
    rl = [("step", f"RL alone P={num}", partial(rl_case, num, SIZES[num], dtype, device)) for num in lengths]
    return rl + [("step", f"RIL P={num}", partial(ril_case, num, SIZES[num], dtype, device)) for num in long]
