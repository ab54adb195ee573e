"""group_advantages and policy_loss: the public functions and their validation.

T packed response tokens, H hidden, V vocabulary, N responses.
"""

import torch
from torch import Tensor

from ril_kernels import _native
from ril_kernels._checks import (
    Shapes,
    check_choice,
    check_device,
    check_finite,
    check_index_range,
    check_number,
    check_tensor,
    dtype_name,
    refuse,
    result_dtype,
)
from ril_kernels.policy_loss.reference import (
    ADVANTAGE_KINDS,
    LOSS_TYPES,
    PolicyMetrics,
    group_advantages_reference,
    policy_loss_reference,
)
from ril_kernels.token_logprob.op import check_head_inputs

ADVANTAGE_BACKENDS = ("auto", "reference", "cpu")


@torch.library.custom_op("ril_kernels::group_advantages", mutates_args=(), device_types="cpu")
def _group_advantages_cpu(rewards: Tensor, groups: Tensor, kind: str) -> Tensor:
    assert rewards.dtype == torch.float32 and groups.dtype == torch.int64 and rewards.shape == groups.shape
    rewards, groups = rewards.contiguous(), groups.contiguous()
    advantages = torch.empty_like(rewards)
    _native.call(
        "ril_group_advantages_f32",
        rewards.data_ptr(),
        groups.data_ptr(),
        rewards.numel(),
        ADVANTAGE_KINDS.index(kind),
        advantages.data_ptr(),
    )
    return advantages


@_group_advantages_cpu.register_fake
def _(rewards: Tensor, groups: Tensor, kind: str) -> Tensor:
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


def _check_rewards(rewards: Tensor, groups: Tensor) -> None:
    check_tensor("rewards", rewards, (torch.float32, torch.float64), "Cast with .float().")
    check_tensor("groups", groups, (torch.int64,), "Pass the question of each response, .long().")
    shapes = Shapes()
    shapes.check("rewards", rewards, "N", "Pass one reward per response, all groups in one flat tensor.")
    shapes.check("groups", groups, "N", "Pass one group id per response.")
    check_device("groups", groups, "rewards", rewards.device)
    remedy = "Find out which reward function produced it; a reply that cannot be scored is a reward of 0."
    check_finite("rewards", rewards, remedy)
    if int(groups.min()) < 0:
        refuse("groups", f"the id {int(groups.min())}", "ids of at least 0", "Number the questions from 0.")
    ids, counts = torch.unique(groups, return_counts=True)
    if int(counts.min()) < 2:
        single = int(ids[counts.argmin()])
        remedy = "A lone response has no baseline: sample more responses or drop it."
        refuse("groups", f"a single response in group {single}", "at least 2 responses in each group", remedy)


def group_advantages(
    rewards: Tensor,  # (N,) float32
    groups: Tensor,  # (N,) int64 group id of each response: any order, any ids of at least 0, ragged
    *,
    kind: str = "dr_grpo",
    backend: str = "auto",
) -> Tensor:  # (N,)
    """Advantage of each response over the others of its group; constants, without gradient.

    `kind`: dr_grpo = R - mean; grpo = (R - mean) / (std + 1e-4), unbiased std; rloo = R - mean of the others.
    `backend`: auto is "cpu" (C++) for float32 on a CPU and "reference" for everything else. Reads its inputs'
    values, so pass CPU tensors where a host sync matters.
    """
    check_choice("kind", kind, ADVANTAGE_KINDS, "dr_grpo is what RIL uses.")
    _check_rewards(rewards, groups)
    check_choice("backend", backend, ADVANTAGE_BACKENDS, "Leave the default, 'auto'.")
    runs_on_cpu = rewards.device.type == "cpu" and rewards.dtype == torch.float32
    if backend == "cpu" and not runs_on_cpu:
        got = f"'cpu' for rewards of {dtype_name(rewards.dtype)} on {rewards.device}"
        refuse("backend", got, "float32 rewards on a CPU", "Use backend='auto' or 'reference'.")
    rewards, groups = rewards.detach(), groups.detach()
    if backend == "cpu" or (backend == "auto" and runs_on_cpu):
        return _group_advantages_cpu(rewards, groups, kind)
    return group_advantages_reference(rewards, groups, kind)


def _token_advantages(
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
        advantages = group_advantages(rewards, groups, kind=kind).to(device, dtype)
    name, value, letter = "advantages", advantages, "N"
    if token_advantages is not None:
        name, value, letter = "token_advantages", token_advantages, "T"
    check_tensor(name, value, (dtype,), "Cast it.")
    check_device(name, value, "hidden", device)
    shapes.check(name, value, letter, "advantages is per response, token_advantages per token.")
    if device.type == "cpu":
        check_finite(name, value, "Find out which reward function produced it.")
    if letter == "T":
        check_index_range("response_index", response_index, 2**62, "N", "Number the responses from 0.")
        return value.detach(), int(response_index.max()) + 1
    remedy = "It numbers the responses in the order of rewards or advantages."
    check_index_range("response_index", response_index, shapes.size["N"], "N", remedy)
    return value.detach()[response_index], shapes.size["N"]


def _check_settings(
    beta: float, clip_low: float, clip_high: float, loss_type: str, norm: float, kl_norm: float | None
) -> None:
    check_number("beta", beta, "0 leaves the KL term out.", low_open=False)
    check_number("clip_low", clip_low, "0.2 is usual.", low_open=False)
    if clip_low > 1:
        refuse("clip_low", clip_low, "at most 1", "The ratio is never below 0; 0.2 is usual.")
    check_number("clip_high", clip_high, "0.2 is usual.", low_open=False)
    check_choice("loss_type", loss_type, LOSS_TYPES, "dr_grpo sums tokens, grpo averages each response.")
    check_number("norm", norm, "Pass the global denominator: one for all micro-batches and ranks.")
    if kl_norm is not None:
        check_number("kl_norm", kl_norm, "Pass the global denominator of the KL term, or None for norm.")


def _check_per_token(shapes: Shapes, hidden: Tensor, target: Tensor, values: dict[str, Tensor | None]) -> None:
    """Validates the (T,) arguments, and `target` where a mask counts it."""
    dtypes = {"response_index": torch.int64, "mask": torch.bool, "kl_mask": torch.bool}
    dtypes |= {name: result_dtype(hidden.dtype) for name in ("behavior_logprobs", "reference_logprobs")}
    remedy = "One value per row of hidden."
    for name, value in values.items():
        if value is not None or name == "response_index":
            check_tensor(name, value, (dtypes[name],), remedy)
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
    mask: Tensor | None = None,  # (T,) bool, True counts; None is all
    kl_mask: Tensor | None = None,  # (T,) bool; None is mask
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    advantage: str = "dr_grpo",
    loss_type: str = "dr_grpo",
    norm: float,
    kl_norm: float | None = None,  # None is norm
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
) -> tuple[Tensor, PolicyMetrics]:
    """The clipped policy-gradient loss of packed response tokens; policy_loss_reference holds the formula.

    Everything is a sum over tokens divided by `norm`, so calls on parts of a batch add up exactly, given the
    same norm; with loss_type "grpo" all tokens of a response belong in one call, with `rewards` all responses
    of a group. `rewards` are read on the host: keep them on the CPU and nothing waits for an accelerator.
    """
    shapes = check_head_inputs(hidden, lm_head, target, bias, temperature, softcap)
    _check_settings(beta, clip_low, clip_high, loss_type, norm, kl_norm)
    logprobs = {"behavior_logprobs": behavior_logprobs, "reference_logprobs": reference_logprobs}
    masks = {"mask": mask, "kl_mask": kl_mask}
    _check_per_token(shapes, hidden, target, {"response_index": response_index, **logprobs, **masks})
    kl_is_set = {"beta above 0": beta > 0, "kl_mask": kl_mask is not None, "kl_norm": kl_norm is not None}
    _check_reference(reference_logprobs, kl_is_set)
    given = (rewards, groups, advantages, token_advantages)
    spread, num_responses = _token_advantages(response_index, shapes, result_dtype(hidden.dtype), advantage, *given)
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    clip = {"clip_low": clip_low, "clip_high": clip_high}
    return policy_loss_reference(
        hidden,
        lm_head,
        target,
        response_index=response_index,
        num_responses=num_responses,
        advantages=spread,
        mask=mask,
        kl_mask=mask if kl_mask is None else kl_mask,
        beta=beta,
        loss_type=loss_type,
        norm=norm,
        kl_norm=norm if kl_norm is None else kl_norm,
        **logprobs,
        **clip,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
    )
