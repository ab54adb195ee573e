"""The discriminator's head on a GPU; the definition is discriminator_head_reference, the formulas are in fused.py.

T packed tokens, H hidden, N responses.
    discriminator_forward_kernel    a program per response reads its row once. The last program to finish adds up the
                                    losses, in order: one launch, and repeated runs are bitwise equal.
    discriminator_backward_kernel   a program per COLUMNS of H goes through all responses, so that sums over them need
                                    no atomics and have one order. A row that is the last token of several responses has
                                    the sum of their slopes; each of them writes the same bits there. Finding them takes
                                    N^2 comparisons per program, for the tens to hundreds of responses of a batch.
What a flag leaves out has a pointer to something else, which no thread reads. Row offsets are int64: T x H passes 2^31.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a row that are in registers at a time
ROWS, COLUMNS = 32, 32  # of hidden, likewise; twice the columns spill on sm_80
NUM_WARPS = 4
# Flags: what there is. None is 1, which Triton would take for a constant and compile once more.
BIAS, NORM_WEIGHT, NORM_BIAS, LABELS, LABEL_WEIGHTS, STATS, GRAD_LOGITS, GRAD_LOSS = (
    tl.constexpr(2 << bit) for bit in range(8)
)
GRAD_HIDDEN, GRAD_WEIGHT, GRAD_BIAS, GRAD_NORM_WEIGHT, GRAD_NORM_BIAS = (tl.constexpr(512 << bit) for bit in range(5))


@triton.jit
def _target(label, smoothing):
    return label + smoothing * (1.0 - 2.0 * label)


@triton.jit
def discriminator_forward_kernel(
    hidden,  # (T, H)
    last_index,  # (N,) int64
    weight,  # (H,), and the next two
    norm_weight,
    norm_bias,
    bias,  # (1,)
    labels,  # (N,) float32, and the next
    label_weights,
    logit,  # (N,) float32 out, and the next two
    score,
    reward,
    loss,  # () float32 out
    row_loss,  # (N,) float32 scratch
    finished,  # (1,) int32, 0
    stats,  # (N, 4) float32 out
    eps,
    tau,
    smoothing,
    denominator,
    stride,  # of a row of hidden, in elements
    num_hidden,
    num_responses,
    flags,
    NORM: tl.constexpr,  # of NORMS in fused.py
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    line = hidden + tl.load(last_index + row) * stride
    mean = tl.full((), 0.0, tl.float32)
    squares = tl.full((), 0.0, tl.float32)  # sum of (x - mean)^2
    dot = tl.full((), 0.0, tl.float32)  # sum of g (x - mean)
    g_sum = tl.full((), 0.0, tl.float32)
    constant = tl.full((), 0.0, tl.float32)
    for start in range(0, num_hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_hidden
        x = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        has_weight, has_bias = (flags & NORM_WEIGHT) != 0, (flags & NORM_BIAS) != 0
        g = w * tl.load(norm_weight + columns, mask=inside & has_weight, other=1.0).to(tl.float32)
        constant += tl.sum(w * tl.load(norm_bias + columns, mask=inside & has_bias, other=0.0).to(tl.float32), 0)
        block_g = tl.sum(g, 0)
        if NORM == "layer":
            # Each block about its own mean, then both about the common one: E[x^2] - E[x]^2 would cancel.
            count = tl.minimum(num_hidden - start, BLOCK).to(tl.float32)
            block_mean = tl.sum(x, 0) / count
            shift = block_mean - mean
            after = mean + shift * (count / (start + count))
            squares += shift * shift * (count * start / (start + count))
            dot += (mean - after) * g_sum + (block_mean - after) * block_g
            mean = after
            x = tl.where(inside, x - block_mean, 0.0)
        squares += tl.sum(x * x, 0)
        dot += tl.sum(g * x, 0)
        g_sum += block_g
    rstd = tl.full((), 1.0, tl.float32)
    if NORM != "none":
        rstd = 1.0 / tl.sqrt(squares / num_hidden + eps)
    constant += tl.load(bias, mask=(flags & BIAS) != 0, other=0.0).to(tl.float32)
    z = (rstd * dot + constant) / tau
    e = tl.exp(-tl.abs(z))
    tl.store(logit + row, z)
    tl.store(score + row, tl.where(z >= 0, 1.0, e) / (1.0 + e))
    tl.store(reward + row, tl.where(z - z == 0, tl.where(z < 0, 1.0, 0.0), float("nan")))
    if flags & STATS:
        own = stats + row * 4
        tl.store(own, mean)
        tl.store(own + 1, rstd)
        tl.store(own + 2, g_sum / num_hidden if NORM == "layer" else 0.0)
        tl.store(own + 3, rstd * dot / num_hidden if NORM != "none" else 0.0)
    if flags & LABELS:
        y = _target(tl.load(labels + row), smoothing)
        factor = tl.load(label_weights + row, mask=(flags & LABEL_WEIGHTS) != 0, other=1.0)
        tl.store(row_loss + row, factor * (tl.maximum(z, 0.0) - z * y + tl.log(1.0 + e)))
        tl.debug_barrier()
        if tl.atomic_add(finished, 1, sem="acq_rel") == num_responses - 1:
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, num_responses, BLOCK):
                rows = start + tl.arange(0, BLOCK)
                total += tl.load(row_loss + rows, mask=rows < num_responses, other=0.0, cache_modifier=".cg")
            tl.store(loss, tl.sum(total, 0) / denominator)


@triton.jit
def _slopes(rows, labels, label_weights, score, grad_logit, grad_loss, tau, smoothing, denominator, num, flags):
    """d(loss) of these responses' logits before the temperature; 0 from `num` on."""
    live = rows < num
    slope = tl.load(grad_logit + rows, mask=live & ((flags & GRAD_LOGITS) != 0), other=0.0)
    if flags & GRAD_LOSS:
        error = tl.load(score + rows, mask=live, other=0.0)
        error -= _target(tl.load(labels + rows, mask=live, other=0.0), smoothing)
        factor = tl.load(label_weights + rows, mask=live & ((flags & LABEL_WEIGHTS) != 0), other=1.0)
        slope += tl.where(live, tl.load(grad_loss) * factor * error / denominator, 0.0)
    return slope / tau


@triton.jit
def discriminator_backward_kernel(
    hidden,  # (T, H)
    last_index,  # (N,) int64
    weight,  # (H,), and the next two
    norm_weight,
    norm_bias,
    labels,  # (N,) float32, and the next two
    label_weights,
    score,
    stats,  # (N, 4) float32
    grad_logit,  # (N,) float32
    grad_loss,  # () float32
    grad_hidden,  # (T, H) out, zeros
    grad_weight,  # (H,) out
    grad_bias,  # (1,) out
    grad_norm_weight,  # (H,) out, and the next
    grad_norm_bias,
    tau,
    smoothing,
    denominator,
    stride,
    num_hidden,
    num_responses,
    flags,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < num_hidden
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(norm_weight + columns, mask=inside & ((flags & NORM_WEIGHT) != 0), other=1.0).to(tl.float32)
    beta = tl.load(norm_bias + columns, mask=inside & ((flags & NORM_BIAS) != 0), other=0.0).to(tl.float32)
    g = w * gamma
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    slope_sums = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_responses, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < num_responses
        index = tl.load(last_index + rows, mask=live, other=-1)
        slope = _slopes(rows, labels, label_weights, score, grad_logit, grad_loss, tau, smoothing, denominator,
                        num_responses, flags)  # fmt: skip
        here = live[:, None] & inside[None, :]
        x = tl.load(hidden + index[:, None] * stride + columns[None, :], mask=here, other=0.0).to(tl.float32)
        own = stats + rows * 4
        rstd = tl.load(own + 1, mask=live, other=0.0)
        x_hat = (x - tl.load(own, mask=live, other=0.0)[:, None]) * rstd[:, None]
        sums += slope[:, None] * x_hat
        slope_sums += slope
        if flags & GRAD_HIDDEN:
            shared = tl.zeros((ROWS, ROWS), tl.float32)
            for first in range(0, num_responses, ROWS):
                others = first + tl.arange(0, ROWS)
                theirs = tl.load(last_index + others, mask=others < num_responses, other=-2)
                push = _slopes(others, labels, label_weights, score, grad_logit, grad_loss, tau, smoothing, denominator,
                               num_responses, flags)  # fmt: skip
                shared += tl.where(index[:, None] == theirs[None, :], push[None, :], 0.0)
            mean_g, mean_gx = tl.load(own + 2, mask=live, other=0.0), tl.load(own + 3, mask=live, other=0.0)
            gradient = (rstd * tl.sum(shared, 1))[:, None] * (g[None, :] - mean_g[:, None] - x_hat * mean_gx[:, None])
            place = grad_hidden + index[:, None] * num_hidden + columns[None, :]
            tl.store(place, gradient.to(grad_hidden.dtype.element_ty), mask=here)
    total, slope_total = tl.sum(sums, 0), tl.sum(slope_sums, 0)
    out = grad_hidden.dtype.element_ty
    tl.store(grad_weight + columns, (gamma * total + beta * slope_total).to(out), inside & ((flags & GRAD_WEIGHT) != 0))
    tl.store(grad_norm_weight + columns, (w * total).to(out), inside & ((flags & GRAD_NORM_WEIGHT) != 0))
    tl.store(grad_norm_bias + columns, (w * slope_total).to(out), inside & ((flags & GRAD_NORM_BIAS) != 0))
    if (flags & GRAD_BIAS) != 0 and tl.program_id(0) == 0:
        tl.store(grad_bias, slope_total.to(out))


def _given(*values: tuple[Tensor | None, tl.constexpr]) -> int:
    return sum(flag.value for value, flag in values if value is not None and value.numel())


def forward(hidden, last_index, weight, bias, norm_weight, norm_bias, labels, label_weights, final_norm, eps,
            temperature, label_smoothing, norm, logits, scores, rewards, loss, stats) -> None:  # fmt: skip
    """discriminator_head of fused.py, on hidden's device."""
    num = len(last_index)
    flags = _given((bias, BIAS), (norm_weight, NORM_WEIGHT), (norm_bias, NORM_BIAS), (labels, LABELS),
                   (label_weights, LABEL_WEIGHTS), (stats, STATS))  # fmt: skip
    norm_weight, norm_bias, bias = (weight if each is None else each for each in (norm_weight, norm_bias, bias))
    finished = (torch.empty if labels is None else torch.zeros)(1, dtype=torch.int32, device=hidden.device)
    labels, label_weights = (scores if each is None else each for each in (labels, label_weights))
    discriminator_forward_kernel[(num,)](
        hidden, last_index, weight, norm_weight, norm_bias, bias, labels, label_weights, logits, scores, rewards,
        loss, torch.empty_like(logits), finished, stats, eps, temperature, label_smoothing, norm, hidden.stride(0),
        hidden.shape[1], num, flags, NORM=final_norm, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def backward(hidden, last_index, weight, norm_weight, norm_bias, labels, label_weights, scores, stats, grad_logits,
             grad_loss, temperature, label_smoothing, norm, *gradients: Tensor) -> None:  # fmt: skip
    """discriminator_head_grad of fused.py, on hidden's device."""
    wanted = (GRAD_HIDDEN, GRAD_WEIGHT, GRAD_BIAS, GRAD_NORM_WEIGHT, GRAD_NORM_BIAS)
    flags = _given(*zip(gradients, wanted, strict=True), (grad_logits, GRAD_LOGITS), (grad_loss, GRAD_LOSS),
                   (norm_weight, NORM_WEIGHT), (norm_bias, NORM_BIAS), (label_weights, LABEL_WEIGHTS))  # fmt: skip
    norm_weight, norm_bias = (weight if each is None else each for each in (norm_weight, norm_bias))
    per_response = (scores if each is None else each for each in (labels, label_weights, scores))
    grad_logits, grad_loss = (scores if each is None else each for each in (grad_logits, grad_loss))
    discriminator_backward_kernel[(triton.cdiv(hidden.shape[1], COLUMNS),)](
        hidden, last_index, weight, norm_weight, norm_bias, *per_response, stats, grad_logits, grad_loss, *gradients,
        temperature, label_smoothing, norm, hidden.stride(0), hidden.shape[1], len(last_index), flags,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
