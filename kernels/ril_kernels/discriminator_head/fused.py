"""discriminator_head in one pass forward and one backward. T packed tokens, H hidden, N responses.

With g = norm_weight * weight and x_hat a response's normalised state, its logit is sum(g x_hat) + constant, and
    d(x) = d(logit) rstd (g - mean(g) - x_hat mean(g x_hat))      without mean(g) for rms; d(logit) g without a norm
    d(norm_weight) = weight S,  d(weight) = norm_weight S + norm_bias D,  d(norm_bias) = weight D,  d(bias) = D
    S = sum_n d(logit_n) x_hat_n,  D = sum_n d(logit_n)
Backward needs four float32 per response besides the inputs: mean, rstd, mean(g), mean(g x_hat), with which all norms
are one formula (0, 1, 0, 0 without one).
"""

import torch
from torch import Tensor

from ril_kernels import _native
from ril_kernels.discriminator_head.reference import DiscriminatorOutput, HeadSettings

NORMS = ("none", "rms", "layer")  # NONE, RMS and LAYER of cpu.cpp
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


# Not by `custom_op`, whose wrappers took a quarter of the time of a call with N = 1.
_library = torch.library.Library("ril_kernels", "FRAGMENT")
_library.define(
    "discriminator_head(Tensor hidden, Tensor last_index, Tensor weight, Tensor? bias, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? labels, Tensor? label_weights, str final_norm, float eps, float temperature, "
    "float label_smoothing, float norm, bool keep, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "discriminator_head_grad(Tensor hidden, Tensor last_index, Tensor weight, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? labels, Tensor? label_weights, Tensor scores, Tensor stats, Tensor? grad_logits, Tensor? grad_loss, "
    "float temperature, float label_smoothing, float norm, bool[] needs, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(
    hidden, last_index, weight, bias, norm_weight, norm_bias, labels, label_weights, final_norm, eps, temperature,
    label_smoothing, norm, keep, backend,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Logits, scores, rewards (N,), loss (), and with `keep` what backward needs (N, 4): float32 all."""
    _check(hidden, (weight, bias, norm_weight, norm_bias), (labels, label_weights))
    outputs = _outputs(hidden, last_index, labels, keep)
    inputs = (hidden, last_index, weight, bias, norm_weight, norm_bias, labels, label_weights)
    if backend == "triton":
        from ril_kernels.discriminator_head.triton import forward

        forward(*inputs, final_norm, eps, temperature, label_smoothing, norm, *outputs)
        return outputs
    numbers = (*_sizes(hidden, last_index), NORMS.index(final_norm), eps, temperature, label_smoothing, norm)
    name = f"ril_discriminator_forward_{_SUFFIX[hidden.dtype]}"
    _native.call(name, *_addresses(inputs), *numbers, _native.ISA, *_addresses(outputs))
    return outputs


def _backward(
    hidden, last_index, weight, norm_weight, norm_bias, labels, label_weights, scores, stats, grad_logits, grad_loss,
    temperature, label_smoothing, norm, needs, backend,
) -> tuple[Tensor, ...]:  # fmt: skip
    """d of hidden (T, H), weight (1, H), bias (1,), norm_weight and norm_bias (H,); (0,) where `needs` is False."""
    _check(hidden, (weight, norm_weight, norm_bias), (labels, label_weights, scores, stats, grad_logits, grad_loss))
    outputs = _gradients(hidden, needs)
    inputs = (hidden, last_index, weight, norm_weight, norm_bias, labels, label_weights, scores, stats)
    inputs += (grad_logits, grad_loss)
    if backend == "triton":
        from ril_kernels.discriminator_head.triton import backward

        backward(*inputs, temperature, label_smoothing, norm, *outputs)
        return outputs
    numbers = (*_sizes(hidden, last_index), len(hidden), temperature, label_smoothing, norm)
    name = f"ril_discriminator_backward_{_SUFFIX[hidden.dtype]}"
    _native.call(name, *_addresses(inputs), *numbers, _native.ISA, *_addresses(outputs))
    return outputs


def _check(hidden: Tensor, per_hidden: tuple[Tensor | None, ...], per_response: tuple[Tensor | None, ...]) -> None:
    """What only a bug can break: the kernels read these through bare pointers."""
    assert hidden.stride(1) == 1
    for values, dtype in ((per_hidden, hidden.dtype), (per_response, torch.float32)):
        assert all(each is None or (each.dtype == dtype and each.is_contiguous()) for each in values)


def _sizes(hidden: Tensor, last_index: Tensor) -> tuple[int, int, int]:
    return hidden.stride(0), hidden.shape[1], last_index.shape[0]


def _addresses(values: tuple[Tensor | None, ...]) -> list[int | None]:
    return [None if each is None else each.data_ptr() or None for each in values]


def _outputs(hidden: Tensor, last_index: Tensor, labels: Tensor | None, keep: bool) -> tuple[Tensor, ...]:
    num = last_index.shape[0]
    shapes = (num, num, num, 0 if labels is None else (), (num, 4) if keep else 0)
    return tuple([torch.empty(shape, dtype=torch.float32, device=hidden.device) for shape in shapes])


def _gradients(hidden: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    """d(hidden) as zeros: the kernels write the N rows only, and PyTorch fills new pages faster than memset does."""
    tokens, width = hidden.shape
    grad_hidden = hidden.new_zeros((tokens, width) if needs[0] else 0)
    shapes = zip(needs[1:], ((1, width), 1, width, width), strict=True)
    return (grad_hidden, *[hidden.new_empty(shape if needed else 0) for needed, shape in shapes])


for _key in ("CPU", "CUDA"):
    _library.impl("discriminator_head", _forward, _key)
    _library.impl("discriminator_head_grad", _backward, _key)


@torch.library.register_fake("ril_kernels::discriminator_head", lib=_library)
def _(hidden, last_index, weight, bias, norm_weight, norm_bias, labels, label_weights, final_norm, eps, temperature,
      label_smoothing, norm, keep, backend):  # fmt: skip
    return _outputs(hidden, last_index, labels, keep)


@torch.library.register_fake("ril_kernels::discriminator_head_grad", lib=_library)
def _(hidden, last_index, weight, norm_weight, norm_bias, labels, label_weights, scores, stats, grad_logits, grad_loss,
      temperature, label_smoothing, norm, needs, backend):  # fmt: skip
    return _gradients(hidden, needs)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, norm_weight, norm_bias, last_index, labels, label_weights, final_norm, eps,
        temperature, label_smoothing, norm, backend,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        logits, scores, rewards, loss, stats = torch.ops.ril_kernels.discriminator_head.default(
            hidden, last_index, weight, bias, norm_weight, norm_bias, labels, label_weights, final_norm, eps,
            temperature, label_smoothing, norm, True, backend,
        )  # fmt: skip
        ctx.save_for_backward(hidden, last_index, weight, norm_weight, norm_bias, labels, label_weights, scores, stats)
        ctx.rest = temperature, label_smoothing, norm
        ctx.backend = backend
        ctx.mark_non_differentiable(scores, rewards)
        ctx.set_materialize_grads(False)
        return logits, scores, rewards, loss

    @staticmethod
    def backward(ctx, grad_logits: Tensor | None, _scores, _rewards, grad_loss: Tensor | None) -> tuple:
        if grad_logits is None and grad_loss is None:
            return (None,) * 14
        grad_logits = None if grad_logits is None else grad_logits.contiguous()
        needs = list(ctx.needs_input_grad[:5])
        gradients = torch.ops.ril_kernels.discriminator_head_grad.default(
            *ctx.saved_tensors, grad_logits, grad_loss, *ctx.rest, needs, ctx.backend
        )
        return *(each if needed else None for each, needed in zip(gradients, needs, strict=True)), *(None,) * 9


def fused_discriminator_head(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    labels: Tensor | None,
    label_weights: Tensor | None,
    settings: HeadSettings,
    backend: str,
) -> DiscriminatorOutput:
    """As discriminator_head_reference. Without a gradient to come nothing is kept."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    trained = (weight, bias, norm_weight, norm_bias)
    wants_grad = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (hidden, *trained))
    trained = [None if each is None else each.contiguous() for each in trained]
    constants = [None if each is None else each.contiguous() for each in (labels, label_weights)]
    last_index, numbers = last_index.contiguous(), (settings.final_norm or "none", *settings[1:])
    if wants_grad:
        logits, scores, rewards, loss = _Head.apply(hidden, *trained, last_index, *constants, *numbers, backend)
    else:
        logits, scores, rewards, loss, _ = torch.ops.ril_kernels.discriminator_head.default(
            hidden, last_index, *trained, *constants, *numbers, False, backend
        )
    return DiscriminatorOutput(logits, scores, rewards, None if labels is None else loss)
