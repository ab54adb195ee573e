"""What a policy answers, and what it is drawn with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ril_engine.config import SamplingConfig
from ril_engine.errors import UserError
from ril_engine.models import Encoder


@dataclass
class Response:
    """Its log-probs are the sampler's: of the policy as it is, and of what was drawn from."""

    ids: list[int] = field(default_factory=list)  # EOS included where it was reached
    text: str = ""  # up to a stop string
    truncated: bool = False  # ended by the token limit
    sampler_logprobs: list[float] = field(default_factory=list)  # untempered, over all tokens
    sampling_logprobs: list[float] = field(default_factory=list)  # after bans, penalty, temperature, top-k and top-p

    def append(self, drawn: Sequence[float], encoder: Encoder, sampling: SamplingConfig) -> bool:
        """Whether this token, with its two log-probs, ends the response.

        Raises:
            UserError: the log-probs are NaN, as `sample` says where logits are.
        """
        token, sampler_logprob, sampling_logprob = int(drawn[0]), *drawn[1:]
        if math.isnan(sampler_logprob):
            raise UserError(
                f"the model's logits at token {len(self.ids)} of a response are not finite, expected numbers; its "
                "weights have diverged: go back to an earlier checkpoint and lower the learning rate"
            )
        self.ids.append(token)
        self.sampler_logprobs.append(sampler_logprob)
        self.sampling_logprobs.append(sampling_logprob)
        ended, full = token in encoder.eos_ids, len(self.ids) == sampling.max_new_tokens
        if not (ended or full or sampling.stop):
            return False
        self.text, stopped = stopped_text(encoder.decode(self.ids, strip=False), sampling.stop)
        self.truncated = full and not (ended or stopped)
        return ended or full or stopped


def stopped_text(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    found = [at for at in map(text.find, stops) if at >= 0]
    return text[: min(found, default=None)].strip(), bool(found)


def draw_settings(sampling: SamplingConfig, greedy: bool) -> dict[str, float]:
    """Of `sample`. Greedy decoding is the argmax of what may be drawn, without a penalty."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    return {"temperature": 0.0} if greedy else {name: getattr(sampling, name) for name in names}


def seed_of(*parts: int) -> int:
    """63 bits out of a run's seed and what is drawn for, so that no two purposes share their numbers."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> 1)
