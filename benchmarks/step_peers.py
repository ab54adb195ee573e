"""Whole steps as others have them: TRL's GRPOTrainer, and the straightforward RIL."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import step_task
from benchmarks.step_task import Found, Phases, Task, forget, frozen, sharpened
from ril_engine.discriminator import discriminator_batch, encode_for_discriminator, load_decoder
from ril_engine.families import language_model
from ril_engine.loop import Loop
from ril_engine.models import Encoder, load
from ril_engine.placement import to_device
from ril_kernels import group_advantages, policy_loss
from ril_kernels.token_logprob.reference import token_logprob_reference


class TRLStep:
    """A step of TRL's own trainer on the same questions: its methods in the order of its `train`."""

    def __init__(self, task: Task, fused: bool):
        os.environ.pop("LOCAL_RANK", None)  # of a job of one that was there before, which TRL would join
        from datasets import Dataset
        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from trl import GRPOConfig, GRPOTrainer

        from ril_engine.integrations.trl import use_fused_logprob

        tokenizer = AutoProcessor.from_pretrained(task.student).tokenizer
        banned = [*tokenizer.added_tokens_decoder, *range(len(tokenizer), step_task.VOCABULARY)]
        arguments = GRPOConfig(
            output_dir=str(task.folder / "trl"),
            use_cpu=task.device.type == "cpu",
            bf16=task.bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(task.rows) * step_task.SAMPLES,
            num_generations=step_task.SAMPLES,
            max_completion_length=step_task.LENGTH,
            loss_type="dr_grpo",
            scale_rewards="none",
            beta=step_task.BETA,
            use_bias_correction_kl=False,  # TRL 1.16's default gives the same loss another gradient
            learning_rate=step_task.RATE,
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
        self.batch = [trainer.train_dataset[i] for i in range(len(task.rows)) for _ in range(step_task.SAMPLES)]
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
        self.optimizer = torch.optim.AdamW(trained, lr=step_task.RATE, weight_decay=0.0, betas=(0.9, 0.95))
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
            settings = {
                "max_new_tokens": step_task.LENGTH,
                "do_sample": True,
                "top_k": 0,
                "pad_token_id": encoder.pad_id,
            }
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
            norm=float(count * step_task.LENGTH),
            beta=step_task.BETA,
            reference_logprobs=reference,
            kl_mask=on_student,
            kl_norm=float(len(own) * step_task.LENGTH),
            backend="reference",
        )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach()), float(norm)
