"""token_logprob: the public function and its validation. T packed tokens, H hidden, V vocabulary."""

import torch
from torch import Tensor

from ril_kernels._checks import (
    FLOAT_DTYPES,
    Shapes,
    check_choice,
    check_device,
    check_index_range,
    check_number,
    check_tensor,
    refuse,
)
from ril_kernels.token_logprob.chunks import (
    BACKENDS,
    Head,
    HeadGradients,
    counted_rows,
    put_back,
    resolve_backend,
    take,
)
from ril_kernels.token_logprob.reference import IGNORE_INDEX, token_logprob_reference


def check_head_inputs(
    hidden: Tensor,
    lm_head: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> Shapes:
    """Everything that token_logprob and policy_loss have in common, except the range of `target`."""
    shapes = Shapes()
    check_tensor("hidden", hidden, FLOAT_DTYPES, "Pass the final hidden states, one row per packed token.")
    shapes.check("hidden", hidden, "T H", "Pack the tokens, hidden[batch, position], without padding.")
    matrices = {"lm_head": (lm_head, "V H", "Pass the weight as nn.Linear(H, V) stores it, not transposed.")}
    if bias is not None:
        matrices["bias"] = (bias, "V", "Pass the bias of the same head, or None.")
    for name, (value, letters, remedy) in matrices.items():
        check_tensor(name, value, (hidden.dtype,), "Cast it to hidden's dtype.")
        check_device(name, value, "hidden", hidden.device)
        shapes.check(name, value, letters, remedy)
    if not lm_head.is_contiguous():
        refuse("lm_head", f"strides {lm_head.stride()}", "a contiguous (V, H) weight", "Call .contiguous() on it.")
    check_tensor("target", target, (torch.int64,), "Pass the token id that each row of hidden predicts.")
    check_device("target", target, "hidden", hidden.device)
    shapes.check("target", target, "T", "One target per row of hidden.")
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, FLOAT_DTYPES, "Pass a float, or one value per token.")
        check_device("temperature", temperature, "hidden", hidden.device)
        shapes.check("temperature", temperature, "T", "Pass a float, or one value per token.")
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((temperature > 0).all()):
            got = f"the value {float(temperature.min())}"
            refuse("temperature", got, "values above 0", "A greedy policy has no gradient.")
    else:
        check_number("temperature", temperature, "Pass the temperature that the tokens were sampled at.")
    if softcap is not None:
        check_number("softcap", softcap, "Pass the model's final_logit_softcapping, or None for none.")
    return shapes


class _TokenLogprob(torch.autograd.Function):
    """One GEMM forward; backward makes the logits again, chunk by chunk, and needs three."""

    @staticmethod
    def forward(ctx, hidden, lm_head, bias, target, temperature, softcap, backend) -> tuple[Tensor, Tensor]:
        head = Head(hidden, lm_head, target, bias, temperature, softcap, backend)
        logprob, entropy, lse = all_stats(head)
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
        head = Head(hidden, lm_head, target, bias, temperature, ctx.softcap, ctx.backend)
        gradients = HeadGradients(head, ctx.needs_input_grad[:3])
        for part, logits in head.chunks():
            head.grad_(part, logits, lse[part], entropy[part], *(g[part] for g in grads))
            gradients.add(part, logits)
        return *gradients.results(), None, None, None, None


def all_stats(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log-sum-exp of every row, (T,) each; keeps nothing else."""
    parts = [head.stats(part, logits) for part, logits in head.chunks()]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


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
    """`token_logprob_reference` in chunks: one GEMM forward, three backward."""
    wants_grad = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (hidden, lm_head, bias))
    num_tokens = len(target)
    hidden, target, temperature = take(rows, hidden, target, temperature)
    if wants_grad:
        logprob, entropy = _TokenLogprob.apply(hidden, lm_head, bias, target, temperature, softcap, backend)
    else:
        logprob, entropy, _ = all_stats(Head(hidden, lm_head, target, bias, temperature, softcap, backend))
    logprob, entropy = put_back(rows, num_tokens, logprob, entropy)
    return logprob, entropy


def token_logprob(
    hidden: Tensor,  # (T, H)
    lm_head: Tensor,  # (V, H)
    target: Tensor,  # (T,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,), a constant: no gradient is defined for it
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # (T,), or (T,) and (T,)
    """Log-prob of each target token, or (log-prob, entropy) with `return_entropy=True`; both differentiable.

    Row t of `hidden` predicts `target[t]`: the shift between the two is the caller's, once, where the batch
    is built. Results are float32 (float64 for a float64 input). Logits are capped, then divided by the
    temperature. Rows whose target is `ignore_index` give 0 and no gradient.

    The (T, V) logits never exist as a whole. Without gradients one GEMM runs and nothing is kept; backward makes
    the logits again, chunk by chunk, and reads `lm_head` again. `backend`: auto is "cpu" (C++) for float32 and
    bfloat16 on a CPU, "triton" on a GPU (not float64) and "reference" (PyTorch, which does hold the logits) for
    everything else.
    """
    shapes = check_head_inputs(hidden, lm_head, target, bias, temperature, softcap)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        refuse("ignore_index", repr(ignore_index), "an int", "Leave the default, -100.", error=TypeError)
    check_choice("backend", backend, BACKENDS, "Leave the default, 'auto'.")
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        remedy = f"Use ignore_index={ignore_index} for rows that do not count."
        check_index_range("target", target[target != ignore_index], shapes.size["V"], "V", remedy)
    head = {"bias": bias, "temperature": temperature, "softcap": softcap}
    backend = resolve_backend(backend, hidden)
    if backend == "reference":
        logprobs, entropy = token_logprob_reference(hidden, lm_head, target, **head, ignore_index=ignore_index)
    else:
        target = target.masked_fill(target == ignore_index, -1)
        rows = counted_rows(target >= 0, hidden.device)
        logprobs, entropy = fused_token_logprob(hidden, lm_head, target, **head, backend=backend, rows=rows)
    return (logprobs, entropy) if return_entropy else logprobs
