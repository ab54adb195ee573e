"""token_logprob in passes over the logits that never hold them as a whole. T packed tokens, H hidden, V vocabulary."""

import torch
from torch import Tensor

from ril_kernels.token_logprob.chunks import ChunkedPass
from ril_kernels.token_logprob.head import make_head, put_back, take
from ril_kernels.token_logprob.tiles import TiledPass

PASSES = {"cpu": TiledPass, "triton": ChunkedPass}


class _TokenLogprob(torch.autograd.Function):
    """One GEMM forward; backward makes the logits again and needs three."""

    @staticmethod
    def forward(ctx, hidden, lm_head, bias, target, temperature, softcap, backend) -> tuple[Tensor, Tensor]:
        head = make_head(hidden, lm_head, target, bias, temperature, softcap)
        logprob, entropy, lse = PASSES[backend](head).stats()
        ctx.save_for_backward(hidden, lm_head, bias, target, head.temperature, lse, entropy)
        ctx.softcap, ctx.backend = softcap, backend
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        hidden, lm_head, bias, target, temperature, lse, entropy = ctx.saved_tensors
        if grad_logprob is None and grad_entropy is None:
            return (None,) * 7
        grads = [torch.zeros_like(entropy) if g is None else g.contiguous() for g in (grad_logprob, grad_entropy)]
        head = make_head(hidden, lm_head, target, bias, temperature, ctx.softcap)
        results = PASSES[ctx.backend](head).backward(lse, entropy, *grads, ctx.needs_input_grad[:3])
        return *results, None, None, None, None


def fused_token_logprob(
    hidden: Tensor,
    lm_head: Tensor,
    target: Tensor,  # below 0: the row does not count
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    backend: str,
    rows: Tensor | None,  # counted_rows
) -> tuple[Tensor, Tensor]:
    """`token_logprob_reference`: one GEMM forward, three backward."""
    wants_grad = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (hidden, lm_head, bias))
    num_tokens = len(target)
    hidden, target, temperature = take(rows, hidden, target, temperature)
    if wants_grad:
        logprob, entropy = _TokenLogprob.apply(hidden, lm_head, bias, target, temperature, softcap, backend)
    else:
        head = make_head(hidden, lm_head, target, bias, temperature, softcap)
        logprob, entropy, _ = PASSES[backend](head).stats()
    logprob, entropy = put_back(rows, num_tokens, logprob, entropy)
    return logprob, entropy
