"""The pass over the logits on a GPU: a chunk of whole rows at a time, one Triton epilogue between the GEMMs.

T packed tokens, R rows of a chunk, H hidden, V vocabulary. The two epilogues are custom ops: `logits_stats` reads a
chunk once, `logits_grad` reads it once more and writes d(logits) over it. Between the two, whoever calls `train` turns
log-probs into their gradient: an (R,) problem, so that the maths of a loss exists once, in PyTorch.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ril_kernels.token_logprob.head import Head, HeadGradients, spans

CHUNK_BYTES = 1024 * 2**20  # of logits
MAX_CHUNK_ROWS = 4096  # 1 to 4 thousand tokens keep cuBLAS busy


@torch.library.custom_op("ril_kernels::logits_stats", mutates_args=(), device_types="cuda")
def logits_stats(
    logits: Tensor,  # (R, V), rows of any stride
    target: Tensor,  # (R,) int64; outside [0, V): the row does not count
    temperature: Tensor,  # (R,) float32
    softcap: float,  # 0: none
) -> tuple[
    Tensor, Tensor, Tensor
]:  # log-prob, entropy (R,) float32, log-sum-exp (R,) float64; 0 for rows that do not count
    from ril_kernels.token_logprob.triton import logits_stats as launch

    return launch(logits, target, temperature, softcap)


@torch.library.custom_op("ril_kernels::logits_grad", mutates_args=("logits",), device_types="cuda")
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
    from ril_kernels.token_logprob.triton import logits_grad as launch

    launch(logits, target, temperature, softcap, lse, entropy, grad_logprob, grad_entropy)


@logits_stats.register_fake
def _(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    lse = torch.empty_like(temperature, dtype=torch.float64)  # float32 would cost p its digits at logits of 100
    return torch.empty_like(temperature), torch.empty_like(temperature), lse


@logits_grad.register_fake
def _(logits, target, temperature, softcap, lse, entropy, grad_logprob, grad_entropy) -> None:
    return None


class ChunkedPass:
    """See head.py. Holds the buffer that every chunk reuses."""

    def __init__(self, head: Head) -> None:
        self.head, num_vocab = head, len(head.lm_head)
        self._columns = slice(0, num_vocab)
        most = min(CHUNK_BYTES // (num_vocab * head.hidden.element_size()), MAX_CHUNK_ROWS)
        self._rows = spans(len(head.hidden), most)
        # A row stride of whole 16 elements: 128-bit loads and stores in the epilogues.
        stride = -(-num_vocab // 16) * 16
        self._buffer = head.hidden.new_empty(self._rows[0].stop, stride)[:, :num_vocab]
        # The custom ops pick the form by device; the tensors of Triton's interpreter are on the CPU.
        if head.hidden.device.type == "cpu":
            from ril_kernels.token_logprob import triton

            self._stats_op, self._grad_op = triton.logits_stats, triton.logits_grad
        else:
            self._stats_op, self._grad_op = logits_stats, logits_grad

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits, in a buffer that the next chunk overwrites."""
        for rows in self._rows:
            logits = self._buffer[: rows.stop - rows.start]
            self.head.logits(rows, self._columns, logits)
            yield rows, logits

    def _inputs(self, rows: slice) -> tuple[Tensor, Tensor, float]:
        return self.head.target[rows], self.head.temperature[rows], self.head.softcap

    def stats(self) -> tuple[Tensor, Tensor, Tensor]:
        parts = [self._stats_op(logits, *self._inputs(rows)) for rows, logits in self._chunks()]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def train(
        self, loss_gradient: Callable, needs: tuple[bool, bool, bool], entropy_has_gradient: bool
    ) -> tuple[Tensor, Tensor, tuple]:
        gradients, parts = HeadGradients(self.head, needs), []
        for rows, logits in self._chunks():
            logprob, entropy, lse = self._stats_op(logits, *self._inputs(rows))
            grads = loss_gradient(rows, logprob, entropy)
            self._grad_op(logits, *self._inputs(rows), lse, entropy, *grads)
            gradients.add(rows, self._columns, logits)
            parts.append((logprob, entropy))
        return *map(torch.cat, zip(*parts, strict=True)), gradients.results()

    def backward(
        self, lse: Tensor, entropy: Tensor, grad_logprob: Tensor, grad_entropy: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple:
        gradients = HeadGradients(self.head, needs)
        for rows, logits in self._chunks():
            values = (each[rows] for each in (lse, entropy, grad_logprob, grad_entropy))
            self._grad_op(logits, *self._inputs(rows), *values)
            gradients.add(rows, self._columns, logits)
        return gradients.results()
