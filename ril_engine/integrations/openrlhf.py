"""OpenRLHF 0.11's Actor with `token_logprob`: `use_fused_logprob(actor)`, before DeepSpeed wraps it.

B sequences, S positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

from torch import Tensor, nn

from ril_kernels import token_logprob


def use_fused_logprob(actor: nn.Module) -> None:
    """Let an actor's forward score tokens from hidden states: its logits (B, S, V) are never made.

    Its output holds the hidden states under "logits" then, so it is for calls that return log-probs or entropies, as
    OpenRLHF's trainers make them. Under ZeRO-3 the head's own module gathers its weight, forward and backward.

    Raises:
        TypeError: not an Actor of OpenRLHF.
        ValueError: its model does more to its logits than a matrix product.
    """
    home = sys.modules[type(actor).__module__]
    if not hasattr(home, "log_probs_from_logits") or not hasattr(home, "compute_entropy"):
        raise TypeError(
            f"actor: got {type(actor).__name__} of {home.__name__}, expected OpenRLHF 0.11's Actor. Call this before "
            "the strategy prepares it."
        )
    _require_plain_logits(actor)
    theirs = actor.forward
    signature = inspect.signature(theirs)

    def forward(self, *args, **kwargs):
        asked = signature.bind(*args, **kwargs).arguments
        if asked.get("action_mask") is None and not asked.get("return_logprobs") and not asked.get("return_entropy"):
            return theirs(*args, **kwargs)
        head = self.model.get_output_embeddings()

        def scored(states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # (B, S, H) and (B, S) -> (B, S) each
            def fused(module, states, labels):
                flat = states.to(module.weight.dtype).flatten(0, 1)
                return token_logprob(flat, module.weight, labels.flatten(), return_entropy=True)

            with _replaced(head, "forward", MethodType(fused, head)):
                return tuple(value.view(labels.shape) for value in head(states, labels))

        # Their temperature divides what they take for logits, here the states: without a bias that is the same.
        changes = (
            (head, "forward", MethodType(lambda module, states: states, head)),
            (home, "log_probs_from_logits", lambda states, labels: scored(states, labels)[0]),
            (home, "compute_entropy", lambda states: scored(states, states.new_zeros(states.shape[:-1]).long())[1]),
        )
        with ExitStack() as stack:
            for owner, name, value in changes:
                stack.enter_context(_replaced(owner, name, value))
            return theirs(*args, **kwargs)

    actor.forward = MethodType(forward, actor)


def _require_plain_logits(actor: nn.Module) -> None:
    config, head = actor.model.config.get_text_config(), actor.model.get_output_embeddings()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    found = [name for name in names if getattr(config, name, None) is not None]
    found += ["a bias"] if head.bias is not None else []
    if found:
        raise ValueError(
            f"actor: its head has {' and '.join(found)}, expected a plain matrix product. Leave this actor as it is."
        )


@contextmanager
def _replaced(owner: object, name: str, value: Callable) -> Iterator[None]:
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
