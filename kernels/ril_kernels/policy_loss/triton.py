"""group_advantages on a GPU; the definition is group_advantages_reference. N responses.

A program takes ROWS responses and compares their group ids with all N, COLUMNS at a time: groups may have any ids and
lie in any order, nothing is sorted, nothing is added atomically, and the host waits for nothing. That is N^2
comparisons, for the thousands of responses that a batch has. Sums run in float64, as in the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ril_kernels.policy_loss.reference import GRPO_EPSILON

ROWS = 8
COLUMNS = 128
NUM_WARPS = 4
EPSILON = tl.constexpr(GRPO_EPSILON)


@triton.jit
def _peers(group, start, rewards, groups, num_responses, COLUMNS: tl.constexpr):
    """The next COLUMNS responses: whether each is in the group of each of ours (ROWS, COLUMNS), and their rewards."""
    others = start + tl.arange(0, COLUMNS)
    inside = others < num_responses
    same = (group[:, None] == tl.load(groups + others, mask=inside, other=0)[None, :]) & inside[None, :]
    return same, tl.load(rewards + others, mask=inside, other=0.0).to(tl.float64)[None, :]


@triton.jit
def group_advantages_kernel(
    rewards,  # (N,) float32
    groups,  # (N,) int64
    advantages,  # (N,) float32 out
    num_responses,
    KIND: tl.constexpr,  # of ADVANTAGE_KINDS
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = own < num_responses
    reward = tl.load(rewards + own, mask=inside, other=0.0).to(tl.float64)
    group = tl.load(groups + own, mask=inside, other=0)
    counts = tl.zeros((ROWS, COLUMNS), tl.int32)
    totals = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, num_responses, COLUMNS):
        same, theirs = _peers(group, start, rewards, groups, num_responses, COLUMNS)
        counts += same.to(tl.int32)
        totals += tl.where(same, theirs, 0.0)
    count, total = tl.sum(counts, 1).to(tl.float64), tl.sum(totals, 1)
    mean = total / count
    advantage = reward - mean
    if KIND == "rloo":
        advantage = reward - (total - reward) / (count - 1.0)
    if KIND == "grpo":
        squares = tl.zeros((ROWS, COLUMNS), tl.float64)
        for start in range(0, num_responses, COLUMNS):
            same, theirs = _peers(group, start, rewards, groups, num_responses, COLUMNS)
            distance = tl.where(same, theirs - mean[:, None], 0.0)
            squares += distance * distance
        advantage = advantage / (tl.sqrt(tl.sum(squares, 1) / (count - 1.0)) + EPSILON)
    tl.store(advantages + own, advantage.to(tl.float32), mask=inside)


def group_advantages(rewards: Tensor, groups: Tensor, kind: str) -> Tensor:
    """As group_advantages_reference, for float32 rewards, on their device."""
    rewards, groups = rewards.contiguous(), groups.contiguous()
    advantages = torch.empty_like(rewards)
    num = len(rewards)
    group_advantages_kernel[(triton.cdiv(num, ROWS),)](
        rewards, groups, advantages, num, KIND=kind, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS
    )
    return advantages
