"""policy_loss in one pass over the logits. T packed tokens, H hidden, V vocabulary, R rows of a chunk."""

import torch
from torch import Tensor

from ril_kernels.policy_loss.reference import (
    LossSettings,
    PolicyMetrics,
    TokenTerms,
    needed_tokens,
    policy_metrics,
    policy_terms,
)
from ril_kernels.token_logprob.fused import PASSES, fused_token_logprob
from ril_kernels.token_logprob.head import make_head, put_back, take


class _PolicyLoss(torch.autograd.Function):
    """Loss, log-probs and entropies with d(hidden), d(lm_head) and d(bias) made in the same pass over the logits."""

    @staticmethod
    def forward(ctx, hidden, lm_head, bias, target, terms, settings, temperature, softcap, backend):
        head = make_head(hidden, lm_head, target, bias, temperature, softcap)
        losses = []

        def loss_gradient(rows: slice, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
            """d(loss) / d(log-prob) and / d(entropy) of these rows."""
            # A graph of its own: a checkpoint around this call would hook into it, and be replayed within its forward.
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                leaves = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
                loss, _ = policy_terms(*leaves, terms.rows(rows), settings)
                losses.append(loss.detach())
                return torch.autograd.grad(loss, leaves, materialize_grads=True)

        entropy_has_gradient = settings.entropy_coef > 0
        policy, entropy, ctx.gradients = PASSES[backend](head).train(
            loss_gradient, ctx.needs_input_grad[:3], entropy_has_gradient
        )
        ctx.mark_non_differentiable(policy, entropy)
        return torch.stack(losses).sum(), policy, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, *_: object) -> tuple:
        if ctx.gradients is None:
            raise RuntimeError(
                "policy_loss: backward ran before, expected once: the gradients were handed over. Call it again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # Where reading is free the usual factor of 1 saves a pass over d(lm_head).
        if not (grad_loss.device.type == "cpu" and float(grad_loss) == 1.0):
            gradients = [None if each is None else each.mul_(grad_loss) for each in gradients]
        return *gradients, None, None, None, None, None, None


def _as_it_is(value: Tensor) -> Tensor:
    return value


def fused_policy_loss(
    hidden: Tensor,
    lm_head: Tensor,
    target: Tensor,
    terms: TokenTerms,
    settings: LossSettings,
    sequences: tuple[Tensor, int] | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    backend: str,
    rows: Tensor | None,  # counted_rows of needed_tokens
) -> tuple[Tensor, PolicyMetrics]:
    """policy_loss_reference in one pass over the logits; tokens without a gradient cost nothing."""
    num_tokens = len(target)
    target = target.masked_fill(~needed_tokens(terms, settings), -1)
    inputs = (hidden, lm_head, bias)
    wants_grad = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in inputs)
    if sequences is not None or not wants_grad or hidden.dtype == torch.float16:
        # A sequence-level ratio needs every log-prob of a response before any gradient, and float16 a loss scaler's
        # factor before d(logits) underflow: four GEMMs instead of three.
        head = {"bias": bias, "temperature": temperature, "softcap": softcap}
        policy, entropy = fused_token_logprob(hidden, lm_head, target, **head, backend=backend, rows=rows)
        loss, ratios = policy_terms(policy, entropy, terms, settings, sequences)
        return loss, policy_metrics(policy, entropy, terms, settings, ratios)
    hidden, target, temperature = take(rows, hidden, target, temperature)
    each = terms if rows is None else terms.rows(rows)
    options = (temperature, softcap, backend)
    loss, *values = _PolicyLoss.apply(hidden, lm_head, bias, target, each, settings, *options)
    policy, entropy = put_back(rows, num_tokens, *values)
    _, ratios = policy_terms(policy, entropy, terms, settings)
    return loss, policy_metrics(policy, entropy, terms, settings, ratios)
