"""What the fused passes over the logits share: their inputs, which rows take part, and the gradients they add up.

T packed tokens, H hidden, V vocabulary, R rows of a chunk, C columns of a tile. A pass (`tiles.TiledPass` on a CPU,
`chunks.ChunkedPass` on a GPU) has three methods:

    stats()      log-prob, entropy and log-sum-exp of every row: one GEMM, nothing kept
    train()      the same with the gradients of a loss that is known as soon as the log-probs are: three GEMMs
    backward()   the gradients alone, from logits that are made again: three GEMMs
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from ril_kernels._checks import dtype_name, refuse
from ril_kernels.copies import to_device

BACKENDS = ("auto", "reference", "cpu", "triton")
CPU_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolve_backend(backend: str, hidden: Tensor) -> str:
    """The form that runs: for "auto" a function of device and dtype alone. A named one that cannot run raises."""
    runs_on_cpu = hidden.device.type == "cpu" and hidden.dtype in CPU_DTYPES
    runs_on_gpu = hidden.device.type == "cuda" and hidden.dtype in TRITON_DTYPES
    if backend == "auto":
        return "cpu" if runs_on_cpu else "triton" if runs_on_gpu else "reference"
    got = f"{backend!r} for {dtype_name(hidden.dtype)} on {hidden.device}"
    if backend == "cpu" and not runs_on_cpu:
        refuse("backend", got, "float32 or bfloat16 on a CPU", "Use backend='auto'.")
    if backend == "triton" and not runs_on_gpu and not _interprets(hidden):
        refuse("backend", got, "float32, bfloat16 or float16 on a CUDA device", "Use backend='auto'.")
    return backend


def _interprets(hidden: Tensor) -> bool:
    """Triton's interpreter runs the kernels on CPU tensors: for tests, in a process that has it on from its start."""
    return hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def counted_rows(
    counts: Tensor,  # (T,) bool
    device: torch.device,
) -> Tensor | None:  # (R,) int64 on `device`; None: all rows, or not known
    """Index of the rows that count, where it can be had without a host sync: from `counts` on the CPU."""
    if counts.device.type != "cpu" or torch.compiler.is_compiling() or bool(counts.all()):
        return None
    rows = counts.nonzero().squeeze(1)
    # Where no row counts one dead row takes part: results and gradients are zeros and still have a graph.
    return to_device(rows if len(rows) else rows.new_zeros(1), device)


def take(
    rows: Tensor | None, hidden: Tensor, target: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, float | Tensor]:
    """The rows that take part. Where dead ones may be among them their hidden states are zeros: 0 times NaN would
    reach d(lm_head)."""
    if rows is not None:
        hidden, target = hidden.index_select(0, rows), target[rows]
        temperature = temperature[rows] if isinstance(temperature, Tensor) else temperature
    if len(target) == 1 or (rows is None and (target.device.type != "cpu" or torch.compiler.is_compiling())):
        hidden = hidden.masked_fill((target < 0)[:, None], 0.0)
    return hidden, target, temperature


def put_back(
    rows: Tensor | None,
    num_tokens: int,
    *values: Tensor,  # (R,)
) -> list[Tensor]:  # (T,), 0 where not in rows
    if rows is None:
        return list(values)
    return [value.new_zeros(num_tokens).index_copy(0, rows, value) for value in values]


class Head(NamedTuple):
    """Hidden states and the head they meet."""

    hidden: Tensor  # (T, H)
    lm_head: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    target: Tensor  # (T,) int64; outside [0, V): the row does not count
    temperature: Tensor  # (T,) float32
    softcap: float  # 0: none

    def logits(self, rows: slice, columns: slice, out: Tensor) -> None:
        """The product of these rows and these columns of the vocabulary, in `out`."""
        states, weight = self.hidden[rows], self.lm_head[columns].T
        if self.bias is None:
            torch.mm(states, weight, out=out)
        else:
            torch.addmm(self.bias[columns], states, weight, out=out)


def make_head(
    hidden: Tensor,
    lm_head: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> Head:
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(torch.float32).contiguous()
    else:
        temperature = torch.full((len(hidden),), temperature, dtype=torch.float32, device=hidden.device)
    return Head(hidden, lm_head, bias, target.contiguous(), temperature, softcap or 0.0)


def spans(length: int, most: int, multiple: int = 1) -> list[slice]:
    """[0, length) in slices of nearly equal size, none longer than `most`; all but the last a `multiple` if it fits."""
    count = max(1, -(-length // max(1, most)))
    size = -(-length // count)
    if multiple <= size < length:  # down, since `most` is a budget
        size -= size % multiple
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class HeadGradients:
    """d(hidden), d(lm_head) and d(bias) of the tiles added so far, for those that want one."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], memory: Tensor | None = None) -> None:
        """`memory`: (V, H) float32 for d(lm_head)."""
        self.head = head
        self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.wants_head = needs[1]
        # On a GPU the first product in 16 bits is the buffer.
        in_place = head.hidden.device.type == "cpu" or head.hidden.dtype == torch.float32
        if needs[1] and in_place and memory is None:
            memory = torch.empty_like(head.lm_head, dtype=torch.float32)
        self.lm_head = memory
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if needs[2] else None

    def add(self, rows: slice, columns: slice, grad_logits: Tensor) -> None:
        """The first tile of a row, and of a column, overwrites: no pass only writes zeros."""
        states, weight = self.head.hidden[rows], self.head.lm_head[columns]
        if self.hidden is not None:
            out, keep = self.hidden[rows], int(columns.start > 0)
            torch.addmm(out, grad_logits, weight, beta=keep, out=out)
        if self.wants_head and states.device.type != "cpu" and states.dtype != torch.float32:
            # Whole rows, see ChunkedPass: the tensor cores multiply in 16 bits and add up in float32.
            product = torch.mm(grad_logits.T, states, out_dtype=torch.float32)
            self.lm_head = product if rows.start == 0 else self.lm_head.add_(product)
        elif self.wants_head:
            out, keep = self.lm_head[columns], int(rows.start > 0)
            torch.addmm(out, grad_logits.T.float(), states.float(), beta=keep, out=out)
        if self.bias is not None:
            self.bias[columns] += grad_logits.sum(0, dtype=torch.float32)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dtype = self.head.hidden.dtype
        return tuple(None if value is None else value.to(dtype) for value in (self.hidden, self.lm_head, self.bias))
