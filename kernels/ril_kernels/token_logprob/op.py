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
from ril_kernels.token_logprob.fused import fused_token_logprob
from ril_kernels.token_logprob.head import BACKENDS, counted_rows, resolve_backend
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
