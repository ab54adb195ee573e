"""The definition of the discriminator's head, loss and reward. T packed tokens, H hidden, N responses."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ril_kernels._checks import result_dtype


class DiscriminatorOutput(NamedTuple):
    """What D says of N responses. Logits, scores and loss are float32, float64 for a float64 input."""

    logits: Tensor  # (N,) divided by the temperature; above 0 for "student"
    scores: Tensor  # (N,) sigmoid(logits), without a gradient
    similarity_rewards: Tensor  # (N,) float32: 1[score < 0.5], NaN for a logit that is not finite; no gradient
    loss: Tensor | None  # (), where there are labels


class HeadSettings(NamedTuple):
    """What discriminator_head takes besides tensors."""

    final_norm: str | None  # "rms", "layer" or None
    eps: float
    temperature: float
    label_smoothing: float
    norm: float  # the loss is divided by it


def normalised(states: Tensor, final_norm: str | None, eps: float) -> Tensor:  # (N, H) -> (N, H)
    """rms: x / sqrt(mean(x^2) + eps); layer: the same of x - mean(x); None: x"""
    if final_norm == "layer":
        states = states - states.mean(1, keepdim=True)
    return states if final_norm is None else states * (states.square().mean(1, keepdim=True) + eps).rsqrt()


def discriminator_head_reference(
    hidden: Tensor,  # (T, H), before the final norm (after it, with final_norm None)
    last_index: Tensor,  # (N,) int64, row of each response's last token
    weight: Tensor,  # (1, H)
    bias: Tensor | None,  # (1,); None is 0
    norm_weight: Tensor | None,  # (H,); None is 1
    norm_bias: Tensor | None,  # (H,); None is 0
    labels: Tensor | None,  # (N,), student = 1, teacher = 0
    label_weights: Tensor | None,  # (N,); None is 1
    settings: HeadSettings,
) -> DiscriminatorOutput:
    """logit_n = (weight . (norm_weight * normalised(hidden[last_index_n]) + norm_bias) + bias) / temperature

    All of it in float32, or in float64 for a float64 input. (Hugging Face's RMSNorm rounds the normalised states to
    the input's dtype before the product with its weight, which nothing gains from.)
    """
    dtype = result_dtype(hidden.dtype)
    states = normalised(hidden[last_index].to(dtype), settings.final_norm, settings.eps)
    states = states if norm_weight is None else states * norm_weight.to(dtype)
    states = states if norm_bias is None else states + norm_bias.to(dtype)
    logits = (states @ weight.to(dtype).T).squeeze(1)
    logits = (logits if bias is None else logits + bias.to(dtype)) / settings.temperature
    found = logits.detach()
    rewards = similarity_reward_reference(found, 2).where(found.isfinite(), torch.nan)
    loss = None
    if labels is not None:
        targets = labels.to(dtype)
        targets = targets + settings.label_smoothing * (1 - 2 * targets)
        loss = discriminator_loss_reference(logits, targets, settings.norm, label_weights)
    return DiscriminatorOutput(logits, found.sigmoid(), rewards, loss)


def discriminator_loss_reference(
    logits: Tensor,  # (N,)
    labels: Tensor,  # (N,), student = 1, teacher = 0
    norm: float,
    label_weights: Tensor | None = None,  # (N,)
) -> Tensor:
    """sum_n -w_n (y_n log sigmoid(x_n) + (1 - y_n) log(1 - sigmoid(x_n))) / norm"""
    weights = None if label_weights is None else label_weights.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), weights, reduction="sum") / norm


def similarity_reward_reference(logits: Tensor, levels: int) -> Tensor:  # (N,) -> (N,) float32
    """With D = sigmoid(logit): 1[D < 0.5] for 2 levels, (ceil(k (1 - D)) - 1) / (k - 1) for k, 1 - D for 0"""
    if levels == 2:
        return (logits < 0).float()
    teacher = torch.sigmoid(-logits.double())  # 1 - D
    if levels:
        teacher = ((levels * teacher).ceil() - 1).clamp(min=0) / (levels - 1)
    return teacher.float()


# name -> (T, H, N, final norm, whether there is a bias, whether rows repeat)
CASES = {
    "tiny": (7, 3, 2, None, True, False),
    "one": (1, 5, 1, "rms", False, False),
    "odd": (101, 17, 13, "rms", True, False),
    "repeated": (9, 37, 20, "rms", True, True),
    "layer": (40, 150, 11, "layer", True, False),
    "layer, repeated": (3, 33, 5, "layer", False, True),
}


def make_inputs(case: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Arguments of discriminator_head for a case of CASES, with labels and weights that differ."""
    num_tokens, num_hidden, num_responses, final_norm, has_bias, repeats = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int, mean: float = 0.0) -> Tensor:
        return (mean + torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    last_index = torch.randperm(num_tokens, generator=generator)[:num_responses]
    if repeats:
        last_index = torch.randint(num_tokens, (num_responses,), generator=generator)
    hidden = values(num_tokens, num_hidden, mean=0.5)
    return {
        "hidden": hidden,
        "last_index": last_index,
        "weight": values(1, num_hidden),
        "bias": values(1) if has_bias else None,
        "final_norm": final_norm,
        "norm_weight": None if final_norm is None else values(num_hidden, mean=1.0),
        "norm_bias": values(num_hidden) if final_norm == "layer" else None,
        "temperature": 1.0 if case == "tiny" else 1.7,
        "labels": torch.rand(num_responses, generator=generator, dtype=torch.float64).round().to(result_dtype(dtype)),
        "label_weights": torch.rand(num_responses, generator=generator) if num_responses > 2 else None,
        "label_smoothing": 0.1 if num_responses > 2 else 0.0,
        "norm": 3.0,
    }
