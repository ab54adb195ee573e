"""discriminator_head, its loss and its reward: the public functions and their validation.

T packed tokens, H hidden, N responses.
"""

import torch
from torch import Tensor

from ril_kernels._checks import (
    FLOAT_DTYPES,
    Shapes,
    check_device,
    check_finite,
    check_index_range,
    check_number,
    check_tensor,
    refuse,
)
from ril_kernels.discriminator_head.reference import (
    discriminator_head_reference,
    discriminator_loss_reference,
    similarity_reward_reference,
)

_LOGIT_DTYPES = (torch.float32, torch.float64)


def discriminator_head(
    hidden: Tensor,  # (T, H), after the final norm
    last_index: Tensor,  # (N,) int64, row of each response's last token
    weight: Tensor,  # (1, H)
    bias: Tensor | None = None,  # (1,)
) -> Tensor:  # (N,)
    """D's logit of each response, above 0 for "student"; float32, float64 for float64 input."""
    shapes = Shapes()
    check_tensor("hidden", hidden, FLOAT_DTYPES, "Pass the states after the final norm.")
    shapes.check("hidden", hidden, "T H", "Pack the tokens, hidden[batch, position], without padding.")
    check_tensor("last_index", last_index, (torch.int64,), "Pass the row of each response's last token.")
    check_device("last_index", last_index, "hidden", hidden.device)
    shapes.check("last_index", last_index, "N", "One row number per response.")
    for name, value, letters in (("weight", weight, "1 H"), ("bias", bias, "1")):
        if value is not None or name == "weight":
            check_tensor(name, value, (hidden.dtype,), "Cast it to hidden's dtype.")
            check_device(name, value, "hidden", hidden.device)
            shapes.check(name, value, letters, "Pass what nn.Linear(H, 1) stores.")
    remedy = "It counts rows of hidden, not positions in a sequence."
    check_index_range("last_index", last_index, shapes.size["T"], "T", remedy)
    return discriminator_head_reference(hidden, last_index, weight, bias)


def discriminator_loss(
    logits: Tensor,  # (N,)
    labels: Tensor,  # (N,) bool or float in [0, 1]: student = 1, teacher = 0
    *,
    norm: float,
) -> Tensor:
    """Binary cross-entropy, summed over the responses and divided by `norm`.

    `norm` is the number of responses over all micro-batches and ranks. Float labels allow label smoothing.
    """
    shapes = Shapes()
    check_tensor("logits", logits, _LOGIT_DTYPES, "Pass what discriminator_head returned.")
    shapes.check("logits", logits, "N", "One logit per response.")
    check_tensor("labels", labels, (torch.bool, *_LOGIT_DTYPES), "student is True or 1, teacher False or 0.")
    check_device("labels", labels, "logits", logits.device)
    shapes.check("labels", labels, "N", "One label per response.")
    if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels <= 1)).all()):
        refuse("labels", "a value outside of [0, 1]", "values in [0, 1]", "student is 1, teacher 0.")
    check_number("norm", norm, "Pass the number of responses over all micro-batches and ranks.")
    return discriminator_loss_reference(logits, labels, norm)


def similarity_reward(logits: Tensor, levels: int = 2) -> Tensor:  # (N,) -> (N,) float32
    """R_sim in [0, 1], high where D gives little to "student". Reads its input's values (a host sync).

    Args:
        levels: 2: 1 where D gives less than 0.5 to "student", else 0; k: k even steps of 1 - D; 0: 1 - D itself.
    """
    check_tensor("logits", logits, _LOGIT_DTYPES, "Pass what discriminator_head returned.")
    Shapes().check("logits", logits, "N", "One logit per response.")
    check_finite("logits", logits, "The discriminator has diverged: look at its loss and learning rate.")
    if not isinstance(levels, int) or levels < 0 or levels == 1:
        refuse("levels", repr(levels), "0, or an integer of 2 or more", "One level is one reward for all responses.")
    return similarity_reward_reference(logits.detach(), levels)
