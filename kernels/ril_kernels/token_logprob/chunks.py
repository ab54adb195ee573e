"""The chunk loop under token_logprob and policy_loss: one GEMM makes a chunk of logits, an epilogue reads it, two
more GEMMs take its gradient. The (T, V) logits never exist as a whole.

T packed tokens, R rows of a chunk, H hidden, V vocabulary. The two epilogues are custom ops: `logits_stats` reads a
chunk once, `logits_grad` reads it once more and writes d(logits) over it. Between the two, whoever calls the loop
turns log-probs into their gradient: a (R,) problem, so that the maths of a loss exists once, in PyTorch.
"""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from ril_kernels import _native
from ril_kernels._checks import dtype_name, refuse

BACKENDS = ("auto", "reference", "cpu", "triton")
# Bytes of a chunk of logits. On a CPU a chunk streams the head from memory once, so larger is faster until the
# logits themselves leave the cache; on a GPU 1 to 4 thousand tokens keep cuBLAS busy.
CHUNK_BYTES = {"cpu": 208 * 2**20, "cuda": 1024 * 2**20}
MAX_CHUNK_ROWS = {"cpu": 1024, "cuda": 4096}
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolve_backend(backend: str, hidden: Tensor) -> str:
    """The form that runs: for "auto" a function of device and dtype alone. A named one that cannot run raises."""
    runs_on_cpu = hidden.device.type == "cpu" and hidden.dtype in _SUFFIX
    runs_on_gpu = hidden.device.type == "cuda" and hidden.dtype in _TRITON_DTYPES
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


@torch.library.custom_op("ril_kernels::logits_stats", mutates_args=(), device_types="cpu")
def logits_stats(
    logits: Tensor,  # (R, V), rows of any stride
    target: Tensor,  # (R,) int64; outside [0, V): the row does not count
    temperature: Tensor,  # (R,) float32
    softcap: float,  # 0: none
) -> tuple[
    Tensor, Tensor, Tensor
]:  # log-prob, entropy (R,) float32, log-sum-exp (R,) float64; 0 for rows that do not count
    logprob, entropy = torch.empty_like(temperature), torch.empty_like(temperature)
    lse = torch.empty_like(temperature, dtype=torch.float64)  # float32 would cost p its digits at logits of 100
    _native.call(f"ril_logits_stats_{_SUFFIX[logits.dtype]}", *_arguments(logits, target, temperature, softcap),
                 logprob.data_ptr(), entropy.data_ptr(), lse.data_ptr())  # fmt: skip
    return logprob, entropy, lse


@torch.library.custom_op("ril_kernels::logits_grad", mutates_args=("logits",), device_types="cpu")
def logits_grad(
    logits: Tensor,  # (R, V), becomes d(logits)
    target: Tensor,  # (R,)
    temperature: Tensor,  # (R,)
    softcap: float,
    lse: Tensor,  # (R,), and the next: of logits_stats
    entropy: Tensor,  # (R,)
    grad_logprob: Tensor,  # (R,)
    grad_entropy: Tensor,  # (R,)
) -> None:
    rows = (lse, entropy, grad_logprob, grad_entropy)
    dtypes = (torch.float64, torch.float32, torch.float32, torch.float32)
    assert all(v.dtype == dtype and v.is_contiguous() for v, dtype in zip(rows, dtypes, strict=True))
    _native.call(f"ril_logits_grad_{_SUFFIX[logits.dtype]}", *_arguments(logits, target, temperature, softcap),
                 *(value.data_ptr() for value in rows))  # fmt: skip


def _arguments(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float) -> tuple:
    assert logits.stride(1) == 1 and target.is_contiguous() and temperature.is_contiguous()
    assert target.dtype == torch.int64 and temperature.dtype == torch.float32
    rows, vocab = logits.shape
    assert target.shape == temperature.shape == (rows,)
    stride = max(logits.stride(0), vocab)  # a single row may have any stride
    return logits.data_ptr(), stride, rows, vocab, target.data_ptr(), temperature.data_ptr(), softcap, _native.ISA


@logits_stats.register_kernel("cuda")
def _logits_stats_triton(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float):
    from ril_kernels.token_logprob.triton import logits_stats as launch

    return launch(logits, target, temperature, softcap)


@logits_grad.register_kernel("cuda")
def _logits_grad_triton(logits, target, temperature, softcap, lse, entropy, grad_logprob, grad_entropy) -> None:
    from ril_kernels.token_logprob.triton import logits_grad as launch

    launch(logits, target, temperature, softcap, lse, entropy, grad_logprob, grad_entropy)


@logits_stats.register_fake
def _(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    lse = torch.empty_like(temperature, dtype=torch.float64)
    return torch.empty_like(temperature), torch.empty_like(temperature), lse


@logits_grad.register_fake
def _(logits, target, temperature, softcap, lse, entropy, grad_logprob, grad_entropy) -> None:
    return None


def chunk_rows(num_rows: int, num_vocab: int, dtype: torch.dtype, device: str) -> int:
    """Rows of a chunk: as many as the memory budget allows, and chunks of equal size."""
    # On a CPU bfloat16 needs a float32 copy of d(logits) for d(lm_head), see _grad_gemms.
    bytes_each = 6 if device == "cpu" and dtype == torch.bfloat16 else dtype.itemsize
    most = max(1, min(CHUNK_BYTES[device] // (num_vocab * bytes_each), MAX_CHUNK_ROWS[device]))
    chunks = -(-num_rows // most)
    return -(-num_rows // max(chunks, 1))


def counted_rows(
    counts: Tensor,  # (T,) bool
    device: torch.device,
) -> Tensor | None:  # (R,) int64 on `device`; None: all rows, or not known
    """Index of the rows that count, where it can be had without a host sync: from `counts` on the CPU."""
    if counts.device.type != "cpu" or torch.compiler.is_compiling() or bool(counts.all()):
        return None
    rows = counts.nonzero().squeeze(1)
    # Where no row counts one dead row takes part: results and gradients are zeros and still have a graph.
    return (rows if len(rows) else rows.new_zeros(1)).to(device, non_blocking=True)


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


class Head:
    """hidden rows x lm_head -> chunks of logits, and back. Holds the buffer that every chunk reuses."""

    def __init__(
        self,
        hidden: Tensor,  # (T, H)
        lm_head: Tensor,  # (V, H)
        target: Tensor,  # (T,), ignored rows outside [0, V)
        bias: Tensor | None,
        temperature: float | Tensor,
        softcap: float | None,
        backend: str,  # "cpu" or "triton"
    ) -> None:
        self.hidden, self.lm_head, self.bias, self.target = hidden, lm_head, bias, target.contiguous()
        if isinstance(temperature, Tensor):
            self.temperature = temperature.detach().to(torch.float32).contiguous()
        else:
            self.temperature = torch.full((len(hidden),), temperature, dtype=torch.float32, device=hidden.device)
        self.softcap = softcap or 0.0
        # The custom op picks the form by device; the interpreter's tensors are on the CPU.
        interpreted = backend == "triton" and hidden.device.type == "cpu"
        self._stats, self._grad = (
            (_logits_stats_triton, _logits_grad_triton) if interpreted else (logits_stats, logits_grad)
        )
        num_vocab = len(lm_head)
        self.rows = chunk_rows(len(hidden), num_vocab, hidden.dtype, hidden.device.type)
        # A row stride of whole 16 elements: 128-bit loads and stores in the Triton epilogues.
        stride = -(-num_vocab // 16) * 16 if backend == "triton" else num_vocab
        self._buffer = hidden.new_empty(self.rows, stride)[:, :num_vocab]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits, in a buffer that the next chunk overwrites."""
        for start in range(0, len(self.hidden), self.rows):
            part = slice(start, min(start + self.rows, len(self.hidden)))
            logits = self._buffer[: part.stop - start]
            if self.bias is None:
                torch.mm(self.hidden[part], self.lm_head.T, out=logits)
            else:
                torch.addmm(self.bias, self.hidden[part], self.lm_head.T, out=logits)
            yield part, logits

    def stats(self, part: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._stats(logits, self.target[part], self.temperature[part], self.softcap)

    def grad_(self, part: slice, logits: Tensor, lse: Tensor, entropy: Tensor, *grads: Tensor) -> None:
        self._grad(logits, self.target[part], self.temperature[part], self.softcap, lse, entropy, *grads)


class HeadGradients:
    """d(hidden), d(lm_head) and d(bias) of the chunks added so far, for those that want one."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.head = head
        self.hidden = torch.empty_like(head.hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.lm_head = torch.empty_like(head.lm_head, dtype=torch.float32) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if needs[2] else None

    def add(self, part: slice, grad_logits: Tensor) -> None:
        states = self.head.hidden[part]
        if self.hidden is not None:
            torch.mm(grad_logits, self.head.lm_head, out=self.hidden[part])
        if self.lm_head is not None:
            keep = 0 if part.start == 0 else 1  # the first chunk overwrites: no pass that only writes zeros
            if states.dtype == torch.float32:
                torch.addmm(self.lm_head, grad_logits.T, states, beta=keep, out=self.lm_head)
            elif states.device.type == "cpu":
                torch.addmm(self.lm_head, grad_logits.T.float(), states.float(), beta=keep, out=self.lm_head)
            else:  # the tensor cores multiply in 16 bits and add up in float32
                product = torch.mm(grad_logits.T, states, out_dtype=torch.float32)
                self.lm_head = product if keep == 0 else self.lm_head.add_(product)
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=torch.float32)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dtype = self.head.hidden.dtype
        return tuple(None if value is None else value.to(dtype) for value in (self.hidden, self.lm_head, self.bias))
