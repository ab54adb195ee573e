"""The definition of group_advantages and policy_loss in plain PyTorch, any floating dtype.

T packed response tokens, H hidden, V vocabulary, N responses, Q questions (groups).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ril_kernels.copies import to_device
from ril_kernels.token_logprob.reference import IGNORE_INDEX, token_logprob_reference

ADVANTAGE_KINDS = ("dr_grpo", "grpo", "rloo")  # cpu.cpp numbers them in this order
# The first three are one formula: what tells them apart is the `norm` that the caller passes.
TOKEN_SUM = ("dr_grpo", "bnpo", "dapo", "cispo")  # w_t = 1
RESPONSE_MEAN = ("grpo", "sapo")  # w_t = 1 / counted tokens of t's response
LOSS_TYPES = TOKEN_SUM + RESPONSE_MEAN
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k3", "k1", "k2")
GRPO_EPSILON = 1e-4  # as in TRL 1.16


class PolicyMetrics(NamedTuple):
    """Detached; 0-dim tensors but for `logprobs`. Means are over the tokens that `mask` counts and that had to be
    computed: those without any gradient (advantage 0, no entropy bonus, no KL) are not."""

    kl: Tensor | None  # mean of the estimator over computed tokens of kl_mask; None without reference_logprobs
    clip_low_fraction: Tensor  # ratio below 1 - clip_low where the advantage is negative
    clip_high_fraction: Tensor  # ratio above 1 + clip_high where the advantage is positive (cispo: above clip_high)
    entropy: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    gradient_fraction: Tensor  # share of num_tokens whose log-prob has a gradient
    num_tokens: Tensor  # int64, counted by mask
    num_computed: Tensor  # int64, of num_tokens
    num_kl_tokens: Tensor  # int64, computed tokens that kl_mask counts
    logprobs: Tensor  # (T,) policy_logprobs, the behavior_logprobs of the next update; 0 where not computed


class TokenTerms(NamedTuple):
    """What the loss needs of each token apart from its log-prob and entropy, (T,) each and without gradient."""

    advantages: Tensor
    weight: Tensor  # w_t
    mask: Tensor  # bool
    kl_mask: Tensor  # bool
    behavior_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    importance_weights: Tensor | None

    def rows(self, index: Tensor | slice) -> "TokenTerms":
        return TokenTerms(*(None if value is None else value[index] for value in self))

    def to(self, device: torch.device) -> "TokenTerms":
        return TokenTerms(*(None if value is None else to_device(value, device) for value in self))


class LossSettings(NamedTuple):
    """The numbers of a loss; `policy_loss` documents and checks them."""

    beta: float
    clip_low: float
    clip_high: float
    clip_max: float | None
    loss_type: str
    kl_estimator: str
    entropy_coef: float
    importance_cap: float | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    norm: float
    kl_norm: float


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


def needed_tokens(terms: TokenTerms, settings: LossSettings) -> Tensor:  # (T,) bool
    """Tokens whose log-prob can have a gradient. No other is computed."""
    pushed = terms.mask if settings.entropy_coef > 0 else terms.mask & (terms.advantages != 0)
    return pushed | terms.kl_mask if settings.beta > 0 else pushed


class TokenRatios(NamedTuple):
    """What `policy_metrics` reports of a loss, (T,) each."""

    ratio: Tensor
    low: Tensor  # bool, clipped below
    high: Tensor  # bool, clipped above
    stopped: Tensor  # bool, no gradient through the ratio
    kl: Tensor | None


def policy_terms(
    policy: Tensor,  # (T,) log-probs
    entropy: Tensor,  # (T,)
    terms: TokenTerms,
    settings: LossSettings,
    sequences: tuple[Tensor, int] | None = None,  # response of each token (T,) int64 and N, for sequence-level ratios
) -> tuple[Tensor, TokenRatios]:
    """r_t = policy / behavior, 1 where no behavior is given; at sequence level (GSPO) exp of the mean of log r over
    the response (arXiv 2507.18071).  d_t = log reference_t - log policy_t

    term_t = min(min(r_t, clip_max) A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)    grpo, dr_grpo, bnpo, dapo
             min(r_t, clip_high) A_t log policy_t, the factor before the log constant    cispo (arXiv 2506.13585)
             4 / tau sigmoid(tau (r_t - 1)) A_t, tau by the sign of A_t                  sapo (arXiv 2511.20347)
    term_t is multiplied by importance_t and min(behavior / sampler, importance_cap), both constants; a sampler
    log-prob of NaN, of a token that was not sampled, leaves it as it is
    kl_t   = exp(d_t) - d_t - 1 (k3),  -d_t (k1),  d_t^2 / 2 (k2)

    loss = -sum_{mask} w_t (term_t + entropy_coef entropy_t) / norm  +  beta sum_{kl_mask} w_t kl_t / kl_norm
    """
    mask, kl_mask = _computed(terms, settings)
    advantages = terms.advantages
    behavior = policy.detach() if terms.behavior_logprobs is None else terms.behavior_logprobs
    log_ratio = (policy - behavior).masked_fill(~mask, 0.0)
    if sequences is not None:
        response, num = sequences
        count = log_ratio.new_zeros(num).index_add(0, response, mask.to(log_ratio.dtype)).clamp(min=1.0)
        log_ratio = (log_ratio.new_zeros(num).index_add(0, response, log_ratio) / count)[response]
        log_ratio = log_ratio.masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    low, high = (ratio < 1 - settings.clip_low) & (advantages < 0), (ratio > 1 + settings.clip_high) & (advantages > 0)
    stopped = low | high
    if settings.loss_type == "cispo":
        low, high = torch.zeros_like(low), (ratio > settings.clip_high) & (advantages > 0)
        term, stopped = ratio.clamp(max=settings.clip_high).detach() * advantages * policy, torch.zeros_like(low)
    elif settings.loss_type == "sapo":
        low = high = stopped = torch.zeros_like(low)
        tau = torch.where(advantages > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg).to(ratio)
        term = torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages
    else:
        free = ratio if settings.clip_max is None else ratio.clamp(max=settings.clip_max)
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        term = torch.minimum(free * advantages, clipped * advantages)
        if settings.clip_max is not None:
            stopped = stopped | ((ratio > settings.clip_max) & (advantages < 0))
    if terms.importance_weights is not None:
        term = term * terms.importance_weights
    if terms.sampler_logprobs is not None:
        mismatch = (behavior - terms.sampler_logprobs).exp()
        mismatch = torch.where(terms.sampler_logprobs.isnan(), 1.0, mismatch)
        term = term * (mismatch if settings.importance_cap is None else mismatch.clamp(max=settings.importance_cap))
    if settings.entropy_coef > 0:
        term = term + settings.entropy_coef * entropy
    loss = -(terms.weight * term.masked_fill(~mask, 0.0)).sum() / settings.norm
    kl = None
    if terms.reference_logprobs is not None:
        distance = (terms.reference_logprobs - policy).masked_fill(~kl_mask, 0.0)
        kl = {
            "k3": lambda: torch.expm1(distance) - distance,
            "k1": lambda: -distance,
            "k2": lambda: distance.square() / 2,
        }[settings.kl_estimator]()
        if settings.beta > 0:
            loss = loss + settings.beta * (terms.weight * kl).sum() / settings.kl_norm
    return loss, TokenRatios(ratio, low, high, stopped, kl)


@torch.no_grad()
def policy_metrics(
    policy: Tensor,  # (T,)
    entropy: Tensor,  # (T,)
    terms: TokenTerms,
    settings: LossSettings,
    ratios: TokenRatios,
) -> PolicyMetrics:
    mask, kl_mask = _computed(terms, settings)
    pushed = mask & (terms.advantages != 0) & ~ratios.stopped
    if settings.entropy_coef > 0:
        pushed = mask
    if settings.beta > 0:
        pushed = pushed | kl_mask
    return PolicyMetrics(
        kl=None if ratios.kl is None else _mean(ratios.kl, kl_mask),
        clip_low_fraction=_mean(ratios.low.to(policy.dtype), mask),
        clip_high_fraction=_mean(ratios.high.to(policy.dtype), mask),
        entropy=_mean(entropy, mask),
        ratio_mean=_mean(ratios.ratio, mask),
        ratio_max=ratios.ratio.masked_fill(~mask, 0.0).max(),
        gradient_fraction=(pushed & terms.mask).sum() / terms.mask.sum().clamp(min=1),
        num_tokens=terms.mask.sum(),
        num_computed=mask.sum(),
        num_kl_tokens=kl_mask.sum() if ratios.kl is not None else torch.zeros_like(mask.sum()),
        logprobs=policy.detach(),
    )


def _computed(terms: TokenTerms, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """mask and kl_mask, of the needed tokens alone."""
    needed = needed_tokens(terms, settings)
    return terms.mask & needed, terms.kl_mask & needed


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return values.detach().masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def policy_loss_reference(
    hidden: Tensor,  # (T, H)
    lm_head: Tensor,  # (V, H)
    target: Tensor,  # (T,) int64
    terms: TokenTerms,
    settings: LossSettings,
    sequences: tuple[Tensor, int] | None,
    **head: object,  # bias, temperature, softcap
) -> tuple[Tensor, PolicyMetrics]:
    """policy_terms of token_logprob_reference."""
    target = target.masked_fill(~needed_tokens(terms, settings), IGNORE_INDEX)
    policy, entropy = token_logprob_reference(hidden, lm_head, target, **head)
    loss, ratios = policy_terms(policy, entropy, terms, settings, sequences)
    return loss, policy_metrics(policy, entropy, terms, settings, ratios)


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
