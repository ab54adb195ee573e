"""The definition of group_advantages and policy_loss in plain PyTorch, any floating dtype.

T packed response tokens, H hidden, V vocabulary, N responses, Q questions (groups).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ril_kernels.token_logprob.reference import IGNORE_INDEX, token_logprob_reference

ADVANTAGE_KINDS = ("dr_grpo", "grpo", "rloo")  # cpu.cpp numbers them in this order
LOSS_TYPES = ("dr_grpo", "grpo")
GRPO_EPSILON = 1e-4  # as in TRL 1.16


class PolicyMetrics(NamedTuple):
    """Detached; 0-dim tensors but for `logprobs`. Means are over the tokens that `mask` counts."""

    kl: Tensor | None  # mean k3 over the tokens that kl_mask counts; None without reference_logprobs
    clip_low_fraction: Tensor  # ratio below 1 - clip_low where the advantage is negative
    clip_high_fraction: Tensor  # ratio above 1 + clip_high where the advantage is positive
    entropy: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    num_tokens: Tensor  # int64
    num_kl_tokens: Tensor  # int64
    logprobs: Tensor  # (T,) policy_logprobs, the behavior_logprobs of the next update; 0 where no mask counts


def group_advantages_reference(
    rewards: Tensor,  # (N,)
    groups: Tensor,  # (N,) int64
    kind: str,
) -> Tensor:  # (N,)
    """Over the n responses of a group, mean and unbiased std (n - 1), in float64:

    dr_grpo: R - mean;   grpo: (R - mean) / (std + 1e-4);   rloo: R - mean of the n - 1 others
    """
    _, slot, count = torch.unique(groups, return_inverse=True, return_counts=True)
    exact = rewards.double()
    zeros = torch.zeros(count.numel(), dtype=torch.float64, device=rewards.device)
    total = zeros.index_add(0, slot, exact)
    centred = exact - (total / count)[slot]
    if kind == "grpo":
        std = (zeros.index_add(0, slot, centred.square()) / (count - 1)).sqrt()
        centred = centred / (std[slot] + GRPO_EPSILON)
    elif kind == "rloo":
        centred = exact - (total[slot] - exact) / (count - 1)[slot]
    return centred.to(rewards.dtype)


def policy_loss_reference(
    hidden: Tensor,  # (T, H)
    lm_head: Tensor,  # (V, H)
    target: Tensor,  # (T,) int64
    *,
    response_index: Tensor,  # (T,) int64 in [0, N)
    num_responses: int,
    advantages: Tensor,  # (T,)
    behavior_logprobs: Tensor | None,  # (T,)
    reference_logprobs: Tensor | None,  # (T,)
    mask: Tensor,  # (T,) bool
    kl_mask: Tensor,  # (T,) bool
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
    norm: float,
    kl_norm: float,
    **head: object,  # bias, temperature, softcap
) -> tuple[Tensor, PolicyMetrics]:
    """r_t = policy / behavior (1 where no behavior is given);  d_t = log reference_t - log policy_t
    term_t = min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t);   k3_t = exp(d_t) - d_t - 1
    w_t = 1 (dr_grpo)  or  1 / tokens of t's response that mask counts (grpo)

    loss = -sum_{mask} w_t term_t / norm  +  beta sum_{kl_mask} w_t k3_t / kl_norm
    """
    needed = target.masked_fill(~(mask | kl_mask), IGNORE_INDEX)
    policy, entropy = token_logprob_reference(hidden, lm_head, needed, **head)
    behavior = policy if behavior_logprobs is None else behavior_logprobs
    ratio = (policy - behavior.detach()).masked_fill(~mask, 0.0).exp()
    term = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    weight = torch.ones_like(policy)
    if loss_type == "grpo":
        length = weight.new_zeros(num_responses).index_add(0, response_index, mask.to(weight.dtype))
        weight = 1.0 / length.clamp(min=1.0)[response_index]
    loss = -(weight * term).masked_fill(~mask, 0.0).sum() / norm
    k3 = None
    if reference_logprobs is not None:
        distance = (reference_logprobs.detach() - policy).masked_fill(~kl_mask, 0.0)
        k3 = torch.expm1(distance) - distance
        if beta > 0:
            loss = loss + beta * (weight * k3).sum() / kl_norm
    low, high = (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)
    return loss, _metrics(policy, entropy, ratio, k3, low, high, mask, kl_mask)


@torch.no_grad()
def _metrics(
    policy: Tensor,
    entropy: Tensor,
    ratio: Tensor,
    k3: Tensor | None,
    low: Tensor,
    high: Tensor,
    mask: Tensor,
    kl_mask: Tensor,
) -> PolicyMetrics:
    def mean(values: Tensor, counted: Tensor) -> Tensor:
        return values.to(policy.dtype).masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)

    return PolicyMetrics(
        kl=None if k3 is None else mean(k3, kl_mask),
        clip_low_fraction=mean(low, mask),
        clip_high_fraction=mean(high, mask),
        entropy=mean(entropy, mask),
        ratio_mean=mean(ratio, mask),
        ratio_max=ratio.detach().masked_fill(~mask, 0.0).max(),
        num_tokens=mask.sum(),
        num_kl_tokens=kl_mask.sum() if k3 is not None else torch.zeros_like(mask.sum()),
        logprobs=policy.detach(),
    )


# name -> (tokens of each response, group of each response, H, V, options)
CASES = {
    "tiny": ((2, 3), (0, 0), 4, 5, ()),
    "ragged": ((3, 1, 4, 2, 5), (7, 2, 7, 2, 7), 6, 13, ("behavior", "reference", "kl_mask")),
    "everything": (
        (3, 5, 2, 4),
        (1, 0, 1, 0),
        5,
        11,
        ("behavior", "reference", "kl_mask", "mask", "bias", "temperature", "softcap"),
    ),
    "all_masked": ((2, 2), (0, 0), 3, 4, ("behavior", "reference", "no_mask")),
    "empty_response": ((3, 0, 2), (4, 4, 4), 4, 6, ("behavior",)),
}


def make_inputs(case: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Arguments of policy_loss for a case of CASES, norm = 2G x Q x L with L the longest response."""
    lengths, groups, num_hidden, num_vocab, options = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_responses = sum(lengths), len(lengths)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(to)

    inputs = {"hidden": normal(num_tokens, num_hidden), "lm_head": normal(num_vocab, num_hidden)}
    inputs["target"] = torch.randint(num_vocab, (num_tokens,), generator=generator)
    inputs["response_index"] = torch.repeat_interleave(torch.arange(num_responses), torch.tensor(lengths))
    inputs["rewards"] = torch.randint(3, (num_responses,), generator=generator).float()
    inputs["rewards"][0] += 0.5  # never all equal in the first group
    inputs["groups"] = torch.tensor(groups)
    inputs["norm"] = float(num_responses * max(lengths))
    if "bias" in options:
        inputs["bias"] = normal(num_vocab)
    if "temperature" in options:
        inputs["temperature"] = torch.rand(num_tokens, generator=generator).add(0.5)
    if "softcap" in options:
        inputs["softcap"] = 4.0
    if "mask" in options:
        inputs["mask"] = torch.arange(num_tokens) % 4 != 1
    if "no_mask" in options:
        inputs["mask"] = torch.zeros(num_tokens, dtype=torch.bool)
    head = {name: inputs[name] for name in ("bias", "temperature", "softcap") if name in inputs}
    policy, _ = token_logprob_reference(inputs["hidden"], inputs["lm_head"], inputs["target"], **head)
    if "behavior" in options:  # far enough from the policy for both clips to act
        inputs["behavior_logprobs"] = policy + 0.4 * normal(num_tokens, to=policy.dtype)
    if "reference" in options:
        inputs["reference_logprobs"] = policy + 0.5 * normal(num_tokens, to=policy.dtype)
        inputs["beta"] = 0.1
    if "kl_mask" in options:
        inputs["kl_mask"] = inputs["response_index"] % 2 == 0
        inputs["kl_norm"] = inputs["norm"] / 2
    return inputs
