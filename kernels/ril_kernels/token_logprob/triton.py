"""The epilogue of a chunk of logits on a GPU, one program per row; the definition is token_logprob_reference.

R rows of the chunk, V vocabulary.
    logits_stats_kernel   reads a logit once: log-prob of the target, entropy, log-sum-exp of each row
    logits_grad_kernel    reads it once more and writes d(logits) over it
PADDED says that a row's stride is a whole number of 16 elements, so that loads and stores may run over V into the
padding: a mask at a multiple of 16 is what lets the compiler use 128 bits at a time.
Sums run in float32 in one order, so repeated runs are bitwise equal. Row offsets are int64: R x V passes 2^31.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits of a row that are in registers at a time
NUM_WARPS = 16
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scaled(logit, temperature, softcap, CAPPED: tl.constexpr):
    """z = softcap tanh(logit / softcap) / temperature, and dz / dlogit."""
    if CAPPED:
        # tanh(x) = sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|), which cannot overflow; a series near 0, where it
        # would cancel.
        x = logit / softcap
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
        far = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
        s = x * x
        near = x * (1.0 + s * (-0.333332819422 + s * (0.133314422036 + s * (-0.0537397155531 + s * 0.0206390887954))))
        tanh = tl.where(tl.abs(x) < 0.25, near, far)
        return softcap * tanh / temperature, (1.0 - tanh * tanh) / temperature
    else:
        return logit / temperature, 1.0 / temperature


@triton.jit
def _width(num_vocab, PADDED: tl.constexpr):
    return (num_vocab + 15) // 16 * 16 if PADDED else num_vocab


@triton.jit
def logits_stats_kernel(
    logits,  # (R, V)
    target,  # (R,) int64; outside [0, V): the row does not count
    temperature,  # (R,) float32
    logprob,  # (R,) float32 out
    entropy,  # (R,) float32 out
    lse,  # (R,) float64 out
    softcap,
    stride,  # of a row, in elements
    num_vocab,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(target + row)
    if (chosen < 0) | (chosen >= num_vocab):
        tl.store(logprob + row, 0.0)
        tl.store(entropy + row, 0.0)
        tl.store(lse + row, 0.0)
        return
    line = logits + row * stride
    tau = tl.load(temperature + row)
    top = tl.full((), float("-inf"), tl.float32)
    mass = tl.full((), 0.0, tl.float32)  # sum of exp(z - top)
    weight = tl.full((), 0.0, tl.float32)  # sum of exp(z - top) (z - top)
    width = _width(num_vocab, PADDED)
    for start in range(0, num_vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logit = tl.load(line + columns, mask=columns < width, other=0.0).to(tl.float32)
        z, _ = _scaled(logit, tau, softcap, CAPPED)
        z = tl.where(columns < num_vocab, z, float("-inf"))
        highest = tl.maximum(top, tl.max(z, 0))
        # Rows of nothing but -inf so far keep 0 as their origin; -200 keeps 0 x inf out of the weight.
        origin = tl.where(highest == float("-inf"), 0.0, highest)
        shift = tl.maximum(top - origin, -200.0)
        factor = tl.exp2(shift * LOG2_E)
        distance = tl.maximum(z - origin, -200.0, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(distance * LOG2_E)
        weight = factor * (weight + shift * mass) + tl.sum(e * distance, 0)
        mass = factor * mass + tl.sum(e, 0)
        top = highest
    log_mass = tl.log(mass)
    z, _ = _scaled(tl.load(line + chosen).to(tl.float32), tau, softcap, CAPPED)
    # Relative to the top: the difference of two large float32 would lose digits.
    tl.store(logprob + row, z - top - log_mass)
    tl.store(entropy + row, log_mass - weight / mass)
    tl.store(lse + row, top.to(tl.float64) + log_mass.to(tl.float64))


@triton.jit
def logits_grad_kernel(
    logits,  # (R, V) in and out
    target,  # (R,) int64
    temperature,  # (R,) float32
    lse,  # (R,) float64
    entropy,  # (R,) float32
    grad_logprob,  # (R,) float32
    grad_entropy,  # (R,) float32
    softcap,
    stride,
    num_vocab,
    CAPPED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(target + row)
    line = logits + row * stride
    tau = tl.load(temperature + row)
    exact = tl.load(lse + row)
    high = exact.to(tl.float32)  # two float32: z - high is exact where p is large
    low = (exact - high.to(tl.float64)).to(tl.float32)
    row_entropy = tl.load(entropy + row)
    push, bonus = tl.load(grad_logprob + row), tl.load(grad_entropy + row)
    idle = (chosen < 0) | (chosen >= num_vocab) | ((push == 0.0) & (bonus == 0.0))
    width = _width(num_vocab, PADDED)
    for start in range(0, num_vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        if idle:  # writes zeros whatever the row holds, and reads nothing
            tl.store(line + columns, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=inside)
        else:
            logit = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
            z, slope = _scaled(logit, tau, softcap, CAPPED)
            log_p = tl.maximum(z - high - low, -200.0, propagate_nan=tl.PropagateNan.ALL)
            p = tl.exp2(log_p * LOG2_E)
            onehot = tl.where(columns == chosen, 1.0, 0.0)
            gradient = slope * (push * (onehot - p) - bonus * p * (log_p + row_entropy))
            tl.store(line + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def _padded(logits: Tensor) -> bool:
    return logits.stride(0) % 16 == 0 and logits.storage_offset() % 16 == 0


def logits_stats(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """As chunks.logits_stats, on the device of `logits`."""
    logprob, entropy = torch.empty_like(temperature), torch.empty_like(temperature)
    lse = torch.empty_like(temperature, dtype=torch.float64)
    outputs = (logprob, entropy, lse)
    logits_stats_kernel[(len(logits),)](
        logits, target, temperature, *outputs, softcap, logits.stride(0), logits.shape[1],
        CAPPED=softcap != 0.0, PADDED=_padded(logits), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return outputs


def logits_grad(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float, *rows: Tensor) -> None:
    """As chunks.logits_grad: `rows` are lse, entropy, grad_logprob and grad_entropy."""
    logits_grad_kernel[(len(logits),)](
        logits, target, temperature, *rows, softcap, logits.stride(0), logits.shape[1],
        CAPPED=softcap != 0.0, PADDED=_padded(logits), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
