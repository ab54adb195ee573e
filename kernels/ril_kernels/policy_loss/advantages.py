"""group_advantages: the public function, its validation and its dispatch. N responses."""

import torch
from torch import Tensor

from ril_kernels import _native
from ril_kernels._checks import (
    Shapes,
    check_choice,
    check_device,
    check_finite,
    check_tensor,
    dtype_name,
    refuse,
)
from ril_kernels.policy_loss.reference import ADVANTAGE_KINDS, group_advantages_reference
from ril_kernels.token_logprob.head import BACKENDS


@torch.library.custom_op("ril_kernels::group_advantages", mutates_args=(), device_types="cpu")
def _group_advantages(rewards: Tensor, groups: Tensor, kind: str) -> Tensor:
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


@_group_advantages.register_kernel("cuda")
def _group_advantages_triton(rewards: Tensor, groups: Tensor, kind: str) -> Tensor:
    from ril_kernels.policy_loss.triton import group_advantages as launch

    return launch(rewards, groups, kind)


@_group_advantages.register_fake
def _(rewards: Tensor, groups: Tensor, kind: str) -> Tensor:
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


def _check_rewards(rewards: Tensor, groups: Tensor) -> None:
    check_tensor("rewards", rewards, (torch.float32, torch.float64), "Cast with .float().")
    check_tensor("groups", groups, (torch.int64,), "Pass the question of each response, .long().")
    shapes = Shapes()
    shapes.check("rewards", rewards, "N", "Pass one reward per response, all groups in one flat tensor.")
    shapes.check("groups", groups, "N", "Pass one group id per response.")
    check_device("groups", groups, "rewards", rewards.device)
    if rewards.device.type != "cpu":
        return
    remedy = "Find out which reward function produced it; a reply that cannot be scored is a reward of 0."
    check_finite("rewards", rewards, remedy)
    if int(groups.min()) < 0:
        refuse("groups", f"the id {int(groups.min())}", "ids of at least 0", "Number the questions from 0.")
    ids, counts = torch.unique(groups, return_counts=True)
    if int(counts.min()) < 2:
        single = int(ids[counts.argmin()])
        remedy = "A lone response has no baseline: sample more responses or drop it."
        refuse("groups", f"a single response in group {single}", "at least 2 responses in each group", remedy)


def _resolve_backend(backend: str, rewards: Tensor) -> str:
    """The form that runs: for "auto" a function of device and dtype alone. A named one that cannot run raises."""
    native = {"cpu": "cpu", "cuda": "triton"}.get(rewards.device.type) if rewards.dtype == torch.float32 else None
    if backend == "auto":
        return native or "reference"
    if backend not in ("reference", native):
        got = f"{backend!r} for rewards of {dtype_name(rewards.dtype)} on {rewards.device}"
        place = "a CPU" if backend == "cpu" else "a CUDA device"
        refuse("backend", got, f"float32 rewards on {place}", "Use backend='auto' or 'reference'.")
    return backend


def group_advantages(
    rewards: Tensor,  # (N,) float32
    groups: Tensor,  # (N,) int64 group id of each response: any order, any ids of at least 0, ragged
    *,
    kind: str = "dr_grpo",
    backend: str = "auto",
) -> Tensor:  # (N,)
    """Advantage of each response over the others of its group; constants, without gradient.

    `kind`: dr_grpo = R - mean; grpo = (R - mean) / (std + 1e-4), unbiased std; rloo = R - mean of the others.
    `backend`: auto is "cpu" (C++) for float32 on a CPU, "triton" for float32 on a GPU and "reference" for everything
    else. On a CPU infinities, NaN, negative ids and lone responses are refused. On a GPU no value is looked at, so that
    nothing waits: NaN spreads over its group, and a lone response has the advantage 0 (dr_grpo) or NaN.
    """
    check_choice("kind", kind, ADVANTAGE_KINDS, "dr_grpo is what RIL uses.")
    _check_rewards(rewards, groups)
    check_choice("backend", backend, BACKENDS, "Leave the default, 'auto'.")
    rewards, groups = rewards.detach(), groups.detach()
    if _resolve_backend(backend, rewards) == "reference":
        return group_advantages_reference(rewards, groups, kind)
    return _group_advantages(rewards, groups, kind)
