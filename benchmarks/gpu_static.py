"""`python -m benchmarks run gpu-static`: what compiled kernels need of a GPU, and the least time that they can take.

T packed tokens, H hidden, V vocabulary, N responses of D's batch, B rows of a step of generation.
The time is the largest of four, and no kernel beats any of them (the arrays are taken to fit no cache):
    memory   bytes that its definition reads and writes over the peak rate of the memory
    float32  operations of its definition over the peak rate
    tensor   FLOPs of the GEMMs in the kernel over the tensor cores' peak rate in bfloat16
    issue    instructions of the machine code that every element passes over what the schedulers issue, one instruction
             of a warp per clock each. Of a kernel with fewer programs than multiprocessors, only as many count.
Latency is not in it, nor the launch, so microseconds mean nothing.

cut-cross-entropy makes logits within its kernels, so a logit there is 2 H FLOPs of the tensor cores forward and 6 H
backward: made again, and the gradients of the hidden states and lm_head. Of memory each matrix and gradient counts
once; what several programs read again, or add up behind locks, does not. Of instructions only those of the loops over
H count. Its backward is taken to skip nothing: of a tile of logits whose gradients are all below its filter's eps it
does the first 2 H alone, and so it can beat these times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from benchmarks.cases import MODELS
from benchmarks.kernels import HEAD, TARGETS, TOKENS, Form, cce_forms, forms, liger_forms
from benchmarks.sass import SCHEDULERS, SMS, resources
from ril_engine.gpus import GPU, GPUS

RESPONSES, ROWS = 256, 64  # N, B
# Compute capability and multiprocessors, of the data sheets that ril_engine/gpus.py cites.
BOARDS = {"a100": (80, 108), "h100": (90, 132), "h200": (90, 132), "b200": (100, 148)}
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Work:
    """A kernel's work on each of its elements, by its definition. Every +, x, /, max, exp and comparison of the formula
    is an operation; conversions, masks and what is done once a row are left out."""

    element: str  # what it goes over, a key of _size
    moves: int  # times that an element is read or written
    operations: int
    turn: tuple[str, ...]  # constants whose product is the elements of a program's turn
    loops: int = 1  # of the machine code, that an element passes, in order; 0: there is none, and one turn is all
    gemms: int = 0  # of T x H x V, in the kernel: 2 H FLOPs a logit each
    matrices: int = 0  # times that the hidden states and lm_head, or both gradients, are read or written
    parts: tuple[str, ...] = ()  # in place of `loops`, for each: the constant that is the part of H in one pass of it


TILE = ("BLOCK_B", "BLOCK_V")
WORK = {
    # max, z = l / tau, z - top, exp, sum of e, sum of e (z - top)
    "logits_stats_kernel": Work("logit", 1, 7, ("BLOCK",)),
    # z = l / tau, z - lse, p = exp, slope (push (onehot - p) - bonus p (log p + entropy))
    "logits_grad_kernel": Work("logit", 2, 10, ("BLOCK",)),
    # max, exp and sum, of the logits and of what penalties make of them; drawing passes some of them again
    "sample_kernel": Work("logit of a step", 1, 9, ("BLOCK",)),
    # sum of x^2, g = w gamma, sum of g x; the loop that adds up the losses is the last program's alone
    "discriminator_forward_kernel": Work("hidden", 1, 5, ("BLOCK",)),
    # x_hat, sum of slope x_hat, rstd slope (g - mean_g - x_hat mean_gx)
    "discriminator_backward_kernel": Work("hidden", 2, 7, ("ROWS", "COLUMNS")),
    # log-sum-exp, then over the same logits d(loss) / d(logit)
    "liger_cross_entropy_kernel": Work("logit", 3, 9, ("BLOCK_SIZE",), 2),
    "_selective_log_softmax_kernel": Work("logit", 1, 5, ("BLOCK_N",)),
    "_grpo_loss_fwd_kernel": Work("logit", 1, 5, ("BLOCK_N",)),
    "_grpo_loss_bwd_kernel": Work("logit", 2, 5, ("BLOCK_N",)),
    "_rms_norm_forward_kernel": Work("hidden", 2, 4, ("BLOCK_SIZE",), 0),
    "_rms_norm_backward_kernel": Work("hidden", 3, 10, ("BLOCK_SIZE",)),
    # max, z - max, exp, sum, sum of z over the tokens
    "_cce_lse_forward_kernel": Work("logit", 0, 5, TILE, gemms=1, matrices=1, parts=("BLOCK_D",)),
    # z - lse, exp, p - onehot, |.| < eps, slope (p - onehot)
    "_cce_backward_kernel": Work(
        "logit", 0, 5, TILE, gemms=3, matrices=2, parts=("BLOCK_D", "MM_BACK_BLOCK_D", "MM_BACK_BLOCK_D")
    ),
    # e c and its sum, of the rows of lm_head that the targets name
    "_indexed_neg_dot_forward_kernel": Work("hidden of a token", 2, 2, ("BLOCK_B", "BLOCK_D"), 0),
}


def _size(element: str, hidden: int, vocab: int) -> tuple[int, int]:
    """Rows, and their width."""
    return {
        "logit": (TOKENS, vocab),
        "logit of a step": (ROWS, vocab),
        "hidden": (RESPONSES, hidden),
        "hidden of a token": (TOKENS, hidden),
    }[element]


def _programs(work: Work, constants: dict, rows: int, width: int) -> int:
    if "COLUMNS" in constants:
        return -(-width // constants["COLUMNS"])
    if "BLOCK_B" in constants:  # tiles
        return -(-rows // constants[work.turn[0]]) * -(-width // constants[work.turn[1]])
    return rows


def instructions_per_element(work: Work, form: Form, used: dict, hidden: int) -> float:
    """Of a thread, for each element that it handles: a turn's instructions over the turn's elements."""
    elements = 1
    for name in work.turn:
        elements *= form.constants[name]
    if work.parts:
        passed = sum(n * hidden / form.constants[part] for n, part in zip(used["loops"], work.parts, strict=True))
    else:
        passed = sum(used["loops"][: work.loops]) if work.loops else used["instructions"]
    return passed * form.num_warps * 32 / elements


def least_time(
    elements: int,
    num_bytes: float,
    operations: float,
    instructions: float,
    programs: int,
    board: str,
    tensor_flops: float = 0,
) -> tuple[float, str]:
    """Microseconds on a board, and what limits them; bytes, operations, instructions and FLOPs are per element."""
    target, multiprocessors = BOARDS[board]
    gpu: GPU = GPUS[board]
    # A multiply-add is two operations: lanes x 2 per clock are the peak, SCHEDULERS x 32 threads' instructions issue.
    issued_per_s = gpu.float32_flops_per_s / (2 * SMS[target].float32_lanes) * SCHEDULERS * 32
    limits = {
        "memory": num_bytes / gpu.bytes_per_s,
        "float32": operations / gpu.float32_flops_per_s,
        "tensor": tensor_flops / gpu.bf16_flops_per_s,
        "issue": instructions / (issued_per_s * min(1.0, programs / multiprocessors)),
    }
    limit = max(limits, key=limits.get)
    return elements * limits[limit] * 1e6, limit


def predicted(form: Form, target: int, used: dict) -> dict:
    """Work per element, with HEAD where it depends on H and V, and, for each model and board of the target, the least
    time in microseconds and its limit."""
    work = WORK[form.kernel.__name__]
    per_element, times = {}, {}
    for model, (hidden, vocab) in MODELS.items():
        rows, width = _size(work.element, hidden, vocab)
        moves = work.moves + work.matrices * (TOKENS + vocab) * hidden / (rows * width)
        each = {
            "bytes_per_element": moves * ELEMENT_BYTES[form.dtype],
            "flops_per_element": work.operations,
            "instructions_per_element": instructions_per_element(work, form, used, hidden),
        }
        programs, tensor_flops = _programs(work, form.constants, rows, width), 2 * hidden * work.gemms
        times[model] = {
            board: least_time(rows * width, *each.values(), programs, board, tensor_flops)
            for board, (of, _) in BOARDS.items()
            if of == target
        }
        if model == HEAD:
            per_element = {**each, "tensor_flops_per_element": tensor_flops}
    return {"element": work.element, **per_element, "least_us": times}


def gemms(target: int) -> dict:
    """The three GEMMs of a head with its gradients at the peak of the tensor cores, beside which the rest is to lie."""
    times = {
        model: {
            board: (6 * TOKENS * hidden * vocab / GPUS[board].bf16_flops_per_s * 1e6, "tensor")
            for board, (each, _) in BOARDS.items()
            if each == target
        }
        for model, (hidden, vocab) in MODELS.items()
    }
    return {"library": "bare", "kernel": "the head's three GEMMs", "target": f"sm_{target}", "least_us": times}


def rows(origin: dict) -> Iterator[dict]:
    """One row per kernel, dtype, choice and target. What training runs of them has times too."""
    origin = {"sizes": f"{TOKENS} tokens, {RESPONSES} responses of D, {ROWS} rows of a step of generation", **origin}
    for form in chain(forms(), liger_forms(), cce_forms()):
        for target in TARGETS:
            used = resources(form.compile(target))
            known = form.trains and form.kernel.__name__ in WORK
            yield {
                "library": form.library,
                "kernel": form.kernel.__name__,
                "dtype": form.dtype,
                "constants": {name: value for name, value in form.constants.items() if _plain(value)},
                "num_warps": form.num_warps,
                "target": f"sm_{target}",
                "trains": form.trains,
                **used,
                **(predicted(form, target, used) if known else {}),
                **origin,
            }
    yield from ({**gemms(target), **origin} for target in TARGETS)


def _plain(value: object) -> bool:
    return isinstance(value, (str, bool, int, float))
