"""What is timed: the cases of each op, its candidates and the floor below which no candidate can go.

T packed tokens, H hidden, V vocabulary, N responses. A candidate is added by one line in `candidates`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ril_kernels import discriminator_head, group_advantages, policy_loss, token_logprob
from ril_kernels.discriminator_head.reference import discriminator_head_reference
from ril_kernels.policy_loss.reference import group_advantages_reference
from ril_kernels.token_logprob.reference import token_logprob_reference

BASELINE = "reference"  # our own definition in plain PyTorch, in the case's dtype


@dataclass
class Case:
    """One problem. Every candidate takes `inputs` and returns tensors: outputs, then gradients."""

    name: str
    inputs: dict
    candidates: dict[str, Callable[..., tuple[Tensor, ...]]]
    floor: Callable[[], object]  # the GEMMs that nobody can leave out, or a copy of the bytes that must move
    floor_name: str
    flops: int = 0  # of the GEMMs
    num_bytes: int = 0  # read and written once
    grad: tuple[str, ...] = field(default=())  # inputs that want a gradient


def _with_grad(function: Callable, names: tuple[str, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """The function's first output and the gradients of its sum: forward and backward, as a trainer uses it."""

    def run(**inputs) -> tuple[Tensor, ...]:
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        out = function(**{**inputs, **leaves})
        out = out[0] if isinstance(out, tuple) else out
        return (out.detach(), *torch.autograd.grad(out.sum(), list(leaves.values())))

    return run


def _head_inputs(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
    states = torch.randn(tokens, hidden, generator=generator)
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    return {
        "hidden": states.to(device, dtype),
        "lm_head": head.to(device, dtype),
        "target": target.to(device),
    }


def _gemms(inputs: dict, count: int) -> Callable[[], object]:
    """The bare products: logits, and with count 3 also d(hidden) and d(lm_head)."""
    hidden, head = inputs["hidden"], inputs["lm_head"]

    def run() -> None:
        logits = hidden @ head.T
        if count == 3:
            logits @ head
            logits.T @ hidden

    return run


def _peers() -> dict[str, Callable]:
    """token_logprob as other libraries have it, where they are installed: hidden, lm_head, target -> (T,)."""
    peers: dict[str, Callable] = {}
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, selective_log_softmax
    except ImportError:
        return peers
    # As add_fused_lm_head calls it: without bias and soft-cap, temperature 1, its default chunk, log-probs only.
    peers["TRL ChunkedLogProbFunction"] = lambda hidden, lm_head, target: ChunkedLogProbFunction.apply(
        hidden, lm_head, None, target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )[0]
    peers["TRL selective_log_softmax"] = lambda hidden, lm_head, target: selective_log_softmax(
        hidden @ lm_head.T, target
    )
    return peers


def token_logprob_case(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    inputs = _head_inputs(tokens, hidden, vocabulary, dtype, device)
    grad = ("hidden", "lm_head")
    candidates = {
        BASELINE: _with_grad(token_logprob_reference, grad),
        "compiled reference": _with_grad(torch.compile(token_logprob_reference, dynamic=False), grad),
        "ril_kernels": _with_grad(token_logprob, grad),
    }
    candidates |= {name: _with_grad(peer, grad) for name, peer in _peers().items()}
    return Case(
        f"token_logprob T={tokens} H={hidden} V={vocabulary}",
        inputs,
        candidates,
        _gemms(inputs, 3),
        "3 GEMMs",
        flops=6 * tokens * hidden * vocabulary,
        grad=grad,
    )


def policy_loss_case(
    responses: int, length: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str
) -> Case:
    tokens = responses * length
    inputs = _head_inputs(tokens, hidden, vocabulary, dtype, device)
    with torch.no_grad():
        policy, _ = token_logprob_reference(**inputs)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, tokens, generator=generator).to(policy) * 0.2
    inputs |= {
        "response_index": torch.arange(responses, device=device).repeat_interleave(length),
        "rewards": torch.randint(3, (responses,), generator=generator).float(),
        "groups": torch.arange(responses) // 8,
        "behavior_logprobs": policy + noise[0],
        "reference_logprobs": policy + noise[1],
        "beta": 0.01,
        "norm": float(tokens),
    }
    grad = ("hidden", "lm_head")
    candidates = {
        BASELINE: _with_grad(partial(policy_loss, backend="reference"), grad),
        "ril_kernels": _with_grad(policy_loss, grad),
    }
    return Case(
        f"policy_loss N={responses} L={length} H={hidden} V={vocabulary}",
        inputs,
        candidates,
        _gemms(inputs, 3),
        "3 GEMMs",
        flops=6 * tokens * hidden * vocabulary,
        grad=grad,
    )


def group_advantages_case(responses: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(3, (responses,), generator=generator).float()
    inputs = {"rewards": rewards, "groups": torch.arange(responses) // 8}

    def reference(rewards: Tensor, groups: Tensor) -> tuple[Tensor]:
        return (group_advantages_reference(rewards, groups, "dr_grpo"),)

    def checked(backend: str) -> Callable[..., tuple[Tensor]]:
        return lambda rewards, groups: (group_advantages(rewards, groups, backend=backend),)

    out, ids = torch.empty_like(rewards), torch.empty_like(inputs["groups"])
    candidates = {
        BASELINE: reference,
        "ril_kernels": checked("auto"),
        "ril_kernels (unchecked C++)": lambda rewards, groups: (
            torch.ops.ril_kernels.group_advantages(rewards, groups, "dr_grpo"),
        ),
    }
    return Case(
        f"group_advantages N={responses}",
        inputs,
        candidates,
        lambda: (out.copy_(rewards), ids.copy_(inputs["groups"])),
        "a copy of N float32 and N int64",
        num_bytes=2 * responses * (4 + 8),
    )


def discriminator_head_case(tokens: int, responses: int, hidden: int, dtype: torch.dtype, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden": torch.randn(tokens, hidden, generator=generator).to(device, dtype),
        "last_index": torch.randperm(tokens, generator=generator)[:responses].sort().values.to(device),
        "weight": (torch.randn(1, hidden, generator=generator) / hidden**0.5).to(device, dtype),
        "bias": torch.zeros(1, device=device, dtype=dtype),
    }
    grad = ("hidden", "weight")
    states, rows = inputs["hidden"], inputs["hidden"][:responses]
    candidates = {
        BASELINE: _with_grad(discriminator_head_reference, grad),
        "ril_kernels": _with_grad(discriminator_head, grad),
    }
    return Case(
        f"discriminator_head T={tokens} N={responses} H={hidden}",
        inputs,
        candidates,
        lambda: (rows.clone(), torch.zeros_like(states)),
        "a copy of the N rows, T rows of zeros for d(hidden)",
        flops=4 * responses * hidden,
        num_bytes=(responses + tokens) * hidden * inputs["hidden"].element_size(),
        grad=grad,
    )


def all_cases(device: str) -> list[Callable[[], Case]]:
    """Built one at a time, since the large ones hold gigabytes."""
    if device == "cuda":
        half = torch.bfloat16
        return [
            lambda: token_logprob_case(8192, 2048, 151_936, half, device),
            lambda: policy_loss_case(64, 128, 2048, 151_936, half, device),
            lambda: discriminator_head_case(8192, 64, 2048, half, device),
        ]
    single = torch.float32
    return [
        lambda: token_logprob_case(512, 96, 528, single, device),
        lambda: token_logprob_case(256, 512, 16_384, single, device),
        lambda: policy_loss_case(64, 24, 96, 528, single, device),
        lambda: policy_loss_case(32, 16, 512, 16_384, single, device),
        lambda: group_advantages_case(64, device),
        lambda: group_advantages_case(65_536, device),
        lambda: discriminator_head_case(4096, 64, 96, single, device),
    ]
