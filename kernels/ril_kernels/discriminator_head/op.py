"""discriminator_head, its loss and its reward: the public functions and their validation.

T packed tokens, H hidden, N responses.
"""

import math

import torch
from torch import Tensor

from ril_kernels._checks import (
    FLOAT_DTYPES,
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
from ril_kernels.discriminator_head.fused import fused_discriminator_head
from ril_kernels.discriminator_head.reference import (
    DiscriminatorOutput,
    HeadSettings,
    discriminator_head_reference,
    discriminator_loss_reference,
    similarity_reward_reference,
)
from ril_kernels.token_logprob.head import BACKENDS, resolve_backend

FINAL_NORMS = ("rms", "layer", None)
_LOGIT_DTYPES = (torch.float32, torch.float64)


def _check_tensors(hidden: Tensor, last_index: Tensor, per_hidden: dict[str, tuple[Tensor | None, str]]) -> Shapes:
    shapes = Shapes()
    check_tensor("hidden", hidden, FLOAT_DTYPES, "Pass the states before the final norm, or final_norm=None.")
    shapes.check("hidden", hidden, "T H", "Pack the tokens, hidden[batch, position], without padding.")
    check_tensor("last_index", last_index, (torch.int64,), "Pass the row of each response's last token.")
    check_device("last_index", last_index, "hidden", hidden.device)
    shapes.check("last_index", last_index, "N", "One row number per response.")
    for name, (value, letters) in per_hidden.items():
        if value is not None or name == "weight":
            check_tensor(name, value, (hidden.dtype,), "Cast it to hidden's dtype.")
            check_device(name, value, "hidden", hidden.device)
            remedy = "Pass the final norm's own." if "norm" in name else "Pass what nn.Linear(H, 1) stores."
            shapes.check(name, value, letters, remedy)
    if not torch.compiler.is_compiling():
        remedy = "It counts rows of hidden, not positions in a sequence."
        check_index_range("last_index", last_index, shapes.size["T"], "T", remedy)
    return shapes


def _check_settings(settings: HeadSettings, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    final_norm = settings.final_norm
    if final_norm not in FINAL_NORMS:
        refuse("final_norm", repr(final_norm), "'rms', 'layer' or None", "None is for states after the norm.")
    if norm_weight is not None and final_norm is None:
        refuse("norm_weight", "a tensor with final_norm None", "None", "Pass final_norm='rms' or 'layer'.")
    if norm_bias is not None and final_norm != "layer":
        refuse("norm_bias", f"a tensor with final_norm {final_norm!r}", "None", "Only final_norm='layer' has one.")
    check_number("eps", settings.eps, "Pass the final norm's own, 1e-6 is usual.", low_open=False)
    check_number("temperature", settings.temperature, "1 leaves the logits as they are.")
    check_number("label_smoothing", settings.label_smoothing, "0 is none.", low_open=False)
    if settings.label_smoothing >= 0.5:
        refuse("label_smoothing", settings.label_smoothing, "a number below 0.5", "From 0.5 on the labels say nothing.")


def _check_labels(
    shapes: Shapes,
    device: torch.device,
    labels: Tensor | None,
    label_weights: Tensor | None,
    label_smoothing: float,
    norm: float | None,
) -> None:
    if labels is None:
        given = {"label_weights": label_weights, "label_smoothing": label_smoothing or None, "norm": norm}
        for name in [name for name, value in given.items() if value is not None]:
            refuse(name, "a value without labels", "labels with it", "Without labels there is no loss: leave it out.")
        return
    _check_label_values(labels, shapes, "hidden", device)
    if label_weights is not None:
        check_tensor("label_weights", label_weights, _LOGIT_DTYPES, "One factor of the loss per response.")
        check_device("label_weights", label_weights, "hidden", device)
        shapes.check("label_weights", label_weights, "N", "One factor of the loss per response.")
        low, high = map(float, label_weights.aminmax()) if _readable(label_weights) else (0.0, 1.0)
        if not 0 <= low <= high < math.inf:
            got = f"values from {low:g} to {high:g}"
            refuse("label_weights", got, "finite values of at least 0", "0 leaves a response out.")
    if norm is None:
        refuse("norm", "None with labels", "a number above 0", "Pass the number of responses of all micro-batches.")
    check_number("norm", norm, "Pass the number of responses over all micro-batches and ranks.")


def _readable(values: Tensor) -> bool:
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_label_values(labels: Tensor, shapes: Shapes, like: str, device: torch.device) -> None:
    check_tensor("labels", labels, (torch.bool, *_LOGIT_DTYPES), "student is True or 1, teacher False or 0.")
    check_device("labels", labels, like, device)
    shapes.check("labels", labels, "N", "One label per response.")
    if labels.dtype == torch.bool or not _readable(labels):
        return
    low, high = map(float, labels.aminmax())
    if not 0 <= low <= high <= 1:  # so NaN is refused too
        refuse("labels", "a value outside of [0, 1]", "values in [0, 1]", "student is 1, teacher 0.")


def discriminator_head(
    hidden: Tensor,  # (T, H), before the final norm
    last_index: Tensor,  # (N,) int64, row of each response's last token
    weight: Tensor,  # (1, H)
    bias: Tensor | None = None,  # (1,)
    *,
    final_norm: str | None = None,  # "rms" or "layer"; None: hidden is normalised, or not meant to be
    norm_weight: Tensor | None = None,  # (H,)
    norm_bias: Tensor | None = None,  # (H,), of "layer"
    eps: float = 1e-6,
    temperature: float = 1.0,
    labels: Tensor | None = None,  # (N,) bool or float in [0, 1]: student = 1, teacher = 0
    label_weights: Tensor | None = None,  # (N,)
    label_smoothing: float = 0.0,
    norm: float | None = None,
    backend: str = "auto",
) -> DiscriminatorOutput:
    """D's logit, score and similarity reward of each response, and with `labels` the loss of all.

    The loss is the binary cross-entropy of logits / temperature with labels of 1 - label_smoothing and
    label_smoothing, times label_weights, summed and divided by `norm`: the number of responses over all micro-batches
    and ranks. Only the N rows of last_index are read and normalised, in float32. Logits and loss have gradients, apart
    or together, for hidden, weight, bias, norm_weight and norm_bias, which all have one dtype; several responses may
    end in one row. A logit that is not finite gives a similarity reward of NaN.

    One kernel forward and one backward; under no_grad, or where nothing wants a gradient, nothing is kept. `backend`:
    auto is "cpu" (C++) for float32 and bfloat16 on a CPU, "triton" on a GPU (not float64) and "reference" for
    everything else.
    """
    settings = HeadSettings(final_norm, eps, temperature, label_smoothing, 1.0 if norm is None else norm)
    per_hidden = {"weight": (weight, "1 H"), "bias": (bias, "1")}
    per_hidden |= {"norm_weight": (norm_weight, "H"), "norm_bias": (norm_bias, "H")}
    shapes = _check_tensors(hidden, last_index, per_hidden)
    _check_settings(settings, norm_weight, norm_bias)
    _check_labels(shapes, hidden.device, labels, label_weights, label_smoothing, norm)
    check_choice("backend", backend, BACKENDS, "Leave the default, 'auto'.")
    dtype = result_dtype(hidden.dtype)
    labels, label_weights = (None if each is None else each.detach().to(dtype) for each in (labels, label_weights))
    arguments = (hidden, last_index, weight, bias, norm_weight, norm_bias, labels, label_weights, settings)
    backend = resolve_backend(backend, hidden)
    if backend == "reference":
        return discriminator_head_reference(*arguments)
    return fused_discriminator_head(*arguments, backend)


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
    _check_label_values(labels, shapes, "logits", logits.device)
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
