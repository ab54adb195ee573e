"""policy_loss: the public function and its validation.

T packed response tokens, H hidden, V vocabulary, N responses.
"""

import torch
from torch import Tensor

from ril_kernels._checks import (
    Shapes,
    check_choice,
    check_device,
    check_finite,
    check_index_range,
    check_number,
    check_tensor,
    refuse,
    result_dtype,
)
from ril_kernels.copies import to_device
from ril_kernels.policy_loss.advantages import group_advantages
from ril_kernels.policy_loss.fused import fused_policy_loss
from ril_kernels.policy_loss.reference import (
    ADVANTAGE_KINDS,
    KL_ESTIMATORS,
    LOSS_TYPES,
    RATIO_LEVELS,
    RESPONSE_MEAN,
    LossSettings,
    PolicyMetrics,
    TokenTerms,
    needed_tokens,
    policy_loss_reference,
)
from ril_kernels.token_logprob.head import BACKENDS, counted_rows, resolve_backend
from ril_kernels.token_logprob.op import check_head_inputs

# Per-token arguments that may stay on the CPU beside a hidden on a GPU, as rewards and advantages may. When all that
# are given do, the tokens without a gradient are known on the host and left out.
HOST_SIDE = ("response_index", "mask", "kl_mask")


def _token_advantages(
    hidden_device: torch.device,
    response_index: Tensor,
    shapes: Shapes,
    dtype: torch.dtype,
    kind: str,
    rewards: Tensor | None,
    groups: Tensor | None,
    advantages: Tensor | None,
    token_advantages: Tensor | None,
) -> tuple[Tensor, int]:
    """Advantage of each token (T,), and N."""
    given = {"rewards": rewards, "advantages": advantages, "token_advantages": token_advantages}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        remedy = "Pass rewards with groups, or advantages (N,), or token_advantages (T,)."
        got = " and ".join(names) or "none"
        refuse("rewards, advantages, token_advantages", got, "exactly one of them", remedy)
    if (groups is None) != (rewards is None):
        got = "groups without rewards" if rewards is None else "rewards without groups"
        refuse("groups", got, "both or neither", "groups holds the question of each reward.")
    check_choice("advantage", kind, ADVANTAGE_KINDS, "dr_grpo is what RIL uses.")
    device = response_index.device
    if rewards is not None:
        advantages = group_advantages(rewards, groups, kind=kind).to(dtype)
    name, value, letter = "advantages", advantages, "N"
    if token_advantages is not None:
        name, value, letter = "token_advantages", token_advantages, "T"
    check_tensor(name, value, (dtype,), "Cast it.")
    if value.device.type != "cpu":
        check_device(name, value, "hidden", hidden_device)
    shapes.check(name, value, letter, "advantages is per response, token_advantages per token.")
    if value.device.type == "cpu":
        check_finite(name, value, "Find out which reward function produced it.")
    if letter == "T":
        check_index_range("response_index", response_index, 2**62, "N", "Number the responses from 0.")
        return to_device(value.detach(), device), int(response_index.max()) + 1
    remedy = "It numbers the responses in the order of rewards or advantages."
    check_index_range("response_index", response_index, shapes.size["N"], "N", remedy)
    return to_device(value.detach(), device)[response_index], shapes.size["N"]


def _check_settings(settings: LossSettings, ratio_level: str) -> None:
    at_least_0 = {
        "beta": "0 leaves the KL term out.",
        "clip_low": "0.2 is usual.",
        "clip_high": "0.2 is usual.",
        "entropy_coef": "0 leaves the entropy bonus out.",
    }
    for name, remedy in at_least_0.items():
        check_number(name, getattr(settings, name), remedy, low_open=False)
    if settings.clip_low > 1:
        refuse("clip_low", settings.clip_low, "at most 1", "The ratio is never below 0; 0.2 is usual.")
    above_0 = {
        "norm": "Pass the global denominator: one for all micro-batches and ranks.",
        "kl_norm": "Pass the global denominator of the KL term, or None for norm.",
        "sapo_temperature_pos": "1.0 is usual.",
        "sapo_temperature_neg": "1.05 is usual.",
    }
    for name, remedy in above_0.items():
        check_number(name, getattr(settings, name), remedy)
    check_choice("loss_type", settings.loss_type, LOSS_TYPES, "dr_grpo sums tokens, grpo averages each response.")
    check_choice("kl_estimator", settings.kl_estimator, KL_ESTIMATORS, "k3 is what RIL uses.")
    check_choice("ratio_level", ratio_level, RATIO_LEVELS, "'sequence' is GSPO.")
    ratio_clips = settings.loss_type not in ("cispo", "sapo")
    if ratio_level == "sequence" and not ratio_clips:
        remedy = "cispo and sapo weigh single tokens."
        refuse("ratio_level", f"'sequence' with loss_type {settings.loss_type!r}", "'token'", remedy)
    if settings.importance_cap is not None:
        check_number("importance_cap", settings.importance_cap, "2.0 is usual; None leaves the weights as they are.")
    if settings.clip_max is not None:
        check_number("clip_max", settings.clip_max, "It caps the ratio where the advantage is negative.")
        if not ratio_clips or settings.clip_max <= 1 + settings.clip_high:
            got = f"{settings.clip_max} with loss_type {settings.loss_type!r} and clip_high {settings.clip_high}"
            expected = "a number above 1 + clip_high, with a loss that clips ratios"
            refuse("clip_max", got, expected, "Leave it None, or raise it.")


def _check_per_token(shapes: Shapes, hidden: Tensor, target: Tensor, values: dict[str, Tensor | None]) -> None:
    """Validates the (T,) arguments, and `target` where a mask counts it."""
    dtypes = {"response_index": torch.int64, "mask": torch.bool, "kl_mask": torch.bool}
    dtypes = {name: dtypes.get(name, result_dtype(hidden.dtype)) for name in values}
    remedy = "One value per row of hidden."
    for name, value in values.items():
        if value is not None or name == "response_index":
            check_tensor(name, value, (dtypes[name],), remedy)
            if name not in HOST_SIDE or value.device.type != "cpu":
                check_device(name, value, "hidden", hidden.device)
            shapes.check(name, value, "T", remedy)
    if target.device.type == "cpu":
        masks = [values[name] for name in ("mask", "kl_mask") if values[name] is not None]
        counted = target if values["mask"] is None else target[torch.stack(masks).any(dim=0)]
        remedy = "Every token that mask or kl_mask counts needs a token id."
        check_index_range("target", counted, shapes.size["V"], "V", remedy)


def _check_reference(reference_logprobs: Tensor | None, is_set: dict[str, bool]) -> None:
    for name in [name for name, value in is_set.items() if value and reference_logprobs is None]:
        remedy = "Pass the frozen reference policy's log-probs, or leave the KL settings out."
        refuse("reference_logprobs", f"None with {name}", "a (T,) tensor", remedy)


def policy_loss(
    hidden: Tensor,  # (T, H)
    lm_head: Tensor,  # (V, H)
    target: Tensor,  # (T,) int64
    *,
    response_index: Tensor,  # (T,) int64 in [0, N), the response of each token
    rewards: Tensor | None = None,  # (N,) with groups, on hidden's device or on the CPU
    groups: Tensor | None = None,  # (N,) int64
    advantages: Tensor | None = None,  # (N,) instead of rewards
    token_advantages: Tensor | None = None,  # (T,) instead of rewards
    behavior_logprobs: Tensor | None = None,  # (T,); None is on-policy, ratio 1
    reference_logprobs: Tensor | None = None,  # (T,)
    sampler_logprobs: Tensor | None = None,  # (T,) what generation returned, where it differs from the behavior, or NaN
    importance_weights: Tensor | None = None,  # (T,) ready-made factors of the policy term
    mask: Tensor | None = None,  # (T,) bool, True counts; None is all
    kl_mask: Tensor | None = None,  # (T,) bool; None is mask
    beta: float = 0.0,
    kl_estimator: str = "k3",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_max: float | None = None,  # two-sided clip: caps the ratio where the advantage is negative
    ratio_level: str = "token",  # "sequence" is GSPO
    entropy_coef: float = 0.0,
    importance_cap: float | None = 2.0,  # of behavior / sampler
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    advantage: str = "dr_grpo",
    loss_type: str = "dr_grpo",
    norm: float,
    kl_norm: float | None = None,  # None is norm
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, PolicyMetrics]:
    """The policy-gradient loss of packed response tokens; policy_terms in reference.py holds every formula.

    Everything is a sum over tokens divided by `norm`, so calls on parts of a batch add up exactly, given the
    same norm; with loss_type "grpo" or "sapo", or ratio_level "sequence", all tokens of a response belong in one
    call, with `rewards` all responses of a group. On a GPU keep `response_index`, masks and rewards (or
    advantages) on the CPU: nothing waits for the GPU then, and the tokens without a gradient are known in time.

    Loss and gradients come from one pass over chunks of logits, three GEMMs in all (four with ratio_level
    "sequence" and in float16); tokens whose gradient is known to be 0 (masked, or of advantage 0 without KL and
    entropy bonus) are left out of all of them, and of the metrics. Backward may run once. `backend`: auto is "cpu"
    (C++) for float32 and bfloat16 on a CPU, "triton" on a GPU (not float64) and "reference" for everything else.
    """
    shapes = check_head_inputs(hidden, lm_head, target, bias, temperature, softcap)
    settings = LossSettings(
        beta=beta,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_max=clip_max,
        loss_type=loss_type,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        importance_cap=importance_cap,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        norm=norm,
        kl_norm=norm if kl_norm is None else kl_norm,
    )
    _check_settings(settings, ratio_level)
    per_token = {
        "behavior_logprobs": behavior_logprobs,
        "reference_logprobs": reference_logprobs,
        "sampler_logprobs": sampler_logprobs,
        "importance_weights": importance_weights,
    }
    masks = {"mask": mask, "kl_mask": kl_mask}
    _check_per_token(shapes, hidden, target, {"response_index": response_index, **per_token, **masks})
    kl_is_set = {"beta above 0": beta > 0, "kl_mask": kl_mask is not None, "kl_norm": kl_norm is not None}
    _check_reference(reference_logprobs, kl_is_set)
    check_choice("backend", backend, BACKENDS, "Leave the default, 'auto'.")
    given = (rewards, groups, advantages, token_advantages)
    device = hidden.device
    if not all(value is None or value.device.type == "cpu" for value in (response_index, mask, kl_mask, *given)):
        response_index = to_device(response_index, device)
        mask, kl_mask = (None if value is None else to_device(value, device) for value in (mask, kl_mask))
    args = (device, response_index, shapes, result_dtype(hidden.dtype), advantage)
    spread, num_responses = _token_advantages(*args, *given)
    mask = torch.ones_like(response_index, dtype=torch.bool) if mask is None else mask
    weight = torch.ones_like(spread)
    if loss_type in RESPONSE_MEAN:
        length = weight.new_zeros(num_responses).index_add(0, response_index, mask.to(weight.dtype))
        weight = 1.0 / length.clamp(min=1.0)[response_index]
    constants = {name: None if value is None else value.detach() for name, value in per_token.items()}
    terms = TokenTerms(spread, weight, mask, mask if kl_mask is None else kl_mask, **constants)
    rows = counted_rows(needed_tokens(terms, settings), device)
    terms = terms.to(device)
    sequences = (to_device(response_index, device), num_responses) if ratio_level == "sequence" else None
    head = {"bias": bias, "temperature": temperature, "softcap": softcap}
    backend = resolve_backend(backend, hidden)
    if backend == "reference":
        return policy_loss_reference(hidden, lm_head, target, terms, settings, sequences, **head)
    return fused_policy_loss(hidden, lm_head, target, terms, settings, sequences, **head, backend=backend, rows=rows)
