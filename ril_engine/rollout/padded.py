"""Rollout's work by Hugging Face's own generate, for language models that cannot read packs: a row per response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ril_engine.config import SamplingConfig
from ril_engine.models import Encoder
from ril_engine.placement import to_device
from ril_engine.rollout.response import Response, draw_settings
from ril_kernels import sample, token_bits


class PaddedRollout:
    """Left-padded batches, each prompt once per sample. A response is drawn with the same numbers as Rollout's."""

    def __init__(self, model, encoder: Encoder, sampling: SamplingConfig):
        self.model, self.encoder, self.sampling = model, encoder, sampling

    @torch.no_grad()
    def generate(
        self,
        questions: Sequence[tuple[int, dict]],
        samples: int,
        *,
        seed: int,
        greedy: bool = False,
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[list[Response]]:
        """As Rollout.generate."""
        wanted = [(number, row, i) for number, row in questions for i in range(samples)]
        out: list[Response] = []
        for start in range(0, len(wanted), self.sampling.batch_size):
            part = wanted[start : start + self.sampling.batch_size]
            inputs = to_device(self.encoder.prompts([row for _, row, _ in part]), self.model.device)
            draw = _Draw(self, part, inputs, seed, greedy)
            with self._own_settings():
                self.model.generate(
                    **inputs,
                    logits_processor=[draw],
                    max_new_tokens=self.sampling.max_new_tokens,
                    do_sample=False,
                    eos_token_id=self.encoder.eos_ids,
                    pad_token_id=self.encoder.pad_id,
                )
            for tokens in torch.stack(draw.drawn, dim=1).tolist():
                response = Response()
                next(filter(None, (response.append(each, self.encoder, self.sampling) for each in tokens)), None)
                out.append(response)
            advance(len(part))
        return [out[i : i + samples] for i in range(0, len(out), samples)]

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        """Without the checkpoint's own penalties, which `generate` would add to ours."""
        from transformers import GenerationConfig

        checkpoints, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            yield
        finally:
            self.model.generation_config = checkpoints


class _Draw:
    """A logits processor that draws, and leaves only the token drawn."""

    def __init__(self, rollout: PaddedRollout, part: list[tuple], inputs: dict, seed: int, greedy: bool):
        self.device, self.prompt_length = rollout.model.device, inputs["input_ids"].shape[1]
        self.padding = inputs["attention_mask"] == 0  # (B, S)
        self.settings = draw_settings(rollout.sampling, greedy)
        vocabulary = rollout.model.lm_head.out_features
        self.banned = token_bits(torch.tensor(rollout.encoder.banned_ids), vocabulary).to(self.device)
        self.seed = torch.tensor(seed, device=self.device)
        self.question, self.sample = torch.tensor([(number, i) for number, _, i in part], device=self.device).T
        self.drawn: list[Tensor] = []  # (B, 3) per position: token and its two log-probs

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocabulary = scores.shape[1]
        if self.settings.get("repetition_penalty", 1) != 1:
            # A row's padding is no token of its: the last one stands in for it, which is seen anyway.
            prompt = input_ids[:, : self.prompt_length]
            prompt = torch.where(self.padding, prompt[:, -1:], prompt)
            self.settings["seen"] = token_bits(torch.cat([prompt, input_ids[:, self.prompt_length :]], 1), vocabulary)
        drawn = sample(
            scores,
            seed=self.seed,
            question=self.question,
            sample_number=self.sample,
            position=torch.full_like(self.question, input_ids.shape[1] - self.prompt_length),
            banned=self.banned,
            **self.settings,
        )
        self.drawn.append(torch.stack([each.double() for each in drawn], dim=1))
        return torch.full_like(scores, float("-inf")).scatter(1, drawn.token[:, None], 0.0)
