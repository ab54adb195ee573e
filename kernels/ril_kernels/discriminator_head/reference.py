"""The definition of the discriminator's head, loss and reward. T packed tokens, H hidden, N responses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ril_kernels._checks import result_dtype


def discriminator_head_reference(
    hidden: Tensor,  # (T, H), after the final norm
    last_index: Tensor,  # (N,) int64, row of each response's last token
    weight: Tensor,  # (1, H)
    bias: Tensor | None,  # (1,)
) -> Tensor:  # (N,)
    """logit_n = weight . hidden[last_index_n] + bias, in float32 (float64 for a float64 input)"""
    dtype = result_dtype(hidden.dtype)
    logits = (hidden[last_index].to(dtype) @ weight.to(dtype).T).squeeze(1)
    return logits if bias is None else logits + bias.to(dtype)


def discriminator_loss_reference(
    logits: Tensor,  # (N,)
    labels: Tensor,  # (N,), student = 1, teacher = 0
    norm: float,
) -> Tensor:
    """sum_n -(y log sigmoid(x) + (1 - y) log(1 - sigmoid(x))) / norm"""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / norm


def similarity_reward_reference(logits: Tensor, levels: int) -> Tensor:  # (N,) -> (N,) float32
    """With D = sigmoid(logit): 1[D < 0.5] for 2 levels, (ceil(k (1 - D)) - 1) / (k - 1) for k, 1 - D for 0"""
    if levels == 2:
        return (logits < 0).float()
    teacher = torch.sigmoid(-logits.double())  # 1 - D
    if levels:
        teacher = ((levels * teacher).ceil() - 1).clamp(min=0) / (levels - 1)
    return teacher.float()


# name -> (T, H, N, has a bias)
CASES = {"tiny": (7, 3, 2, True), "one": (1, 5, 1, False), "odd": (101, 17, 13, True)}


def make_inputs(case: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Arguments of discriminator_head for a case of CASES."""
    num_tokens, num_hidden, num_responses, has_bias = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    last_index = torch.randperm(num_tokens, generator=generator)[:num_responses].sort().values
    return {
        "hidden": torch.randn(num_tokens, num_hidden, generator=generator, dtype=torch.float64).to(dtype),
        "last_index": last_index,
        "weight": torch.randn(1, num_hidden, generator=generator, dtype=torch.float64).to(dtype),
        "bias": torch.randn(1, generator=generator, dtype=torch.float64).to(dtype) if has_bias else None,
    }
