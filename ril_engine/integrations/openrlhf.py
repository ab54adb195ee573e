"""OpenRLHF 0.11's Actor with `token_logprob`: `use_fused_logprob(actor)`, before DeepSpeed wraps it.

B sequences, S positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from ril_kernels import token_logprob


def use_fused_logprob(actor: nn.Module) -> None:
    """Let an actor's forward score tokens from hidden states: its logits (B, S, V) are never made.

    In such a forward the head gives log-prob and, if it is asked for, entropy (B, S, 2), which its output then holds
    under "logits"; a call that returns neither runs as before. All of it happens inside the head's own forward, where
    ZeRO-3 gathers its weight for forward and backward.

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
        entropy = bool(asked.get("return_entropy"))
        if asked.get("action_mask") is None and not asked.get("return_logprobs") and not entropy:
            return theirs(*args, **kwargs)
        head, tau = self.model.get_output_embeddings(), self.temperature
        labels = asked["sequences"].roll(-1, dims=1)

        def unpad(*args):  # packed samples
            nonlocal labels
            found = home_unpad(*args)
            labels = found[2]
            return found

        def scored(module, states: Tensor) -> Tensor:  # (B, S, H) -> (B, S, 2), or 1 without an entropy
            flat = states.to(module.weight.dtype).flatten(0, 1)
            values = token_logprob(flat, module.weight, labels.flatten(), temperature=tau, return_entropy=entropy)
            return torch.stack(values if entropy else (values,), dim=-1).view(*labels.shape, -1)

        home_unpad = home.unpad_and_slice_tensor
        # What they take for logits is divided by the temperature on its way.
        changes = (
            (head, "forward", MethodType(scored, head)),
            (home, "unpad_and_slice_tensor", unpad),
            (home, "log_probs_from_logits", lambda values, _: values[..., 0] * tau),
            (home, "compute_entropy", lambda values: values[..., 1] * tau),
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
