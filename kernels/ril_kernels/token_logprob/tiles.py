"""The pass over the logits on a CPU: tiles of rows by columns of the vocabulary, a C++ epilogue between the GEMMs.

T packed tokens, H hidden, V vocabulary, R rows and C columns of a tile. Beside the GEMMs, memory costs time: traffic,
and new pages. The memory of the tiles is this thread's, kept from call to call, and so is that of d(lm_head) once
nobody holds it any more.

- All rows go through one sweep over the vocabulary where they can, so that lm_head is streamed from memory once per
  GEMM. The training pass must hold R x V logits until a row's last column is known, and R is what a memory budget
  allows. But d(lm_head), (V, H), is written only afterwards, column by column: until then its memory holds the logits
  of H rows. So a batch of up to H tokens, and a few hundred more, takes one sweep.
- Where the logits need no second reading (no soft-cap, no gradient of the entropy) the first half keeps
  exp(logit - top) instead, and the second multiplies it by one number per row and block: no exp is taken twice.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ril_kernels import _native
from ril_kernels.token_logprob.head import Head, HeadGradients, spans
from ril_kernels.token_logprob.memory import gradient_memory, scratch

TILE_BYTES = 16 * 2**20  # of a tile: enough for an efficient GEMM, and in the last cache when the next one reads it
WORK_BYTES = 208 * 2**20  # of all logits that are held at a time, besides those in d(lm_head)
CACHE_BYTES = 8 * 2**20  # of a chunk's logits, where lm_head is so small that streaming it again costs less
MAX_ROWS = 2048  # of a tile that nothing holds
COLUMNS = 64  # a tile's width is a multiple: MKL took 1.5 times as long for 15,194 columns as for 15,232
BLOCK = 1024  # of row.h: columns that share one top
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


@torch.library.custom_op(
    "ril_kernels::tile_stats",
    mutates_args=("sums", "kept", "tops", "logprob", "entropy", "lse"),
    device_types="cpu",
)
def tile_stats(
    logits: Tensor,  # (R, C)
    first: int,  # column of the vocabulary that the tile begins with
    num_vocab: int,
    target: Tensor,  # (R,) int64; outside [0, V): the row does not count
    temperature: Tensor,  # (R,) float32
    softcap: float,  # 0: none
    sums: Tensor,  # (R, 4) float64, carried from a row's tile to the next
    kept: Tensor | None,  # (R, C), may be `logits`: becomes exp(z - top). float32 without soft-cap only
    tops: Tensor | None,  # (R, ceil(C / BLOCK)) float32, with `kept`: the tops
    logprob: Tensor,  # (R,) float32, and the next two: written with a row's last tile, 0 where the row does not count
    entropy: Tensor,  # (R,) float32
    lse: Tensor,  # (R,) float64: float32 would cost p its digits at logits of 100
) -> None:
    outputs = (sums, tops, logprob, entropy, lse)
    assert sums.dtype == lse.dtype == torch.float64 and logprob.dtype == entropy.dtype == torch.float32
    assert all(each is None or (each.is_contiguous() and len(each) == len(logits)) for each in outputs)
    assert tops is None or tops.shape[1] == -(-logits.shape[1] // BLOCK)
    assert kept is None or (kept.shape == logits.shape and kept.dtype == torch.float32 and kept.stride(1) == 1)
    _native.call(f"ril_tile_stats_{_SUFFIX[logits.dtype]}", *_tile(logits, first, num_vocab, target, temperature),
                 softcap, _native.ISA, _address(sums), _address(kept), 0 if kept is None else _stride(kept),
                 *map(_address, outputs[1:]))  # fmt: skip


@torch.library.custom_op("ril_kernels::tile_grad", mutates_args=("out",), device_types="cpu")
def tile_grad(
    logits: Tensor,  # (R, C), or with `tops` what tile_stats kept of them
    out: Tensor,  # (R, C), becomes d(logits); may be `logits`
    first: int,
    num_vocab: int,
    target: Tensor,  # (R,)
    temperature: Tensor,  # (R,)
    softcap: float,
    tops: Tensor | None,  # of tile_stats
    lse: Tensor,  # (R,), and the next: of tile_stats
    entropy: Tensor,  # (R,)
    grad_logprob: Tensor,  # (R,)
    grad_entropy: Tensor | None,  # (R,); None with tops
) -> None:
    rows = (tops, lse, entropy, grad_logprob, grad_entropy)
    assert lse.dtype == torch.float64 and all(each.dtype == torch.float32 for each in (entropy, grad_logprob))
    assert all(each is None or (each.is_contiguous() and len(each) == len(logits)) for each in rows)
    assert out.shape == logits.shape and out.dtype == logits.dtype and out.stride(1) == 1
    _native.call(f"ril_tile_grad_{_SUFFIX[logits.dtype]}", *_tile(logits, first, num_vocab, target, temperature),
                 softcap, _native.ISA, out.data_ptr(), _stride(out), *map(_address, rows))  # fmt: skip


@tile_stats.register_fake
def _(logits, first, num_vocab, target, temperature, softcap, sums, kept, tops, logprob, entropy, lse) -> None:
    return None


@tile_grad.register_fake
def _(logits, out, first, num_vocab, target, temperature, softcap, tops, lse, entropy, grad_logprob, grad_entropy):
    return None


def _address(value: Tensor | None) -> int | None:
    return None if value is None else value.data_ptr()


def _stride(matrix: Tensor) -> int:
    return max(matrix.stride(0), matrix.shape[1])  # a single row may have any stride


def _tile(logits: Tensor, first: int, num_vocab: int, target: Tensor, temperature: Tensor) -> tuple:
    assert logits.stride(1) == 1 and target.is_contiguous() and temperature.is_contiguous()
    assert target.dtype == torch.int64 and temperature.dtype == torch.float32
    rows, columns = logits.shape
    assert target.shape == temperature.shape == (rows,)
    pointers = target.data_ptr(), temperature.data_ptr()
    return logits.data_ptr(), _stride(logits), rows, columns, first, num_vocab, *pointers


class _Rows(NamedTuple):
    """What is known of every row: sums on the way, then its results."""

    sums: Tensor
    logprob: Tensor
    entropy: Tensor
    lse: Tensor

    @classmethod
    def of(cls, head: Head) -> "_Rows":
        like, count = head.temperature, len(head.hidden)
        double = like.new_empty(count, dtype=torch.float64)
        return cls(
            like.new_empty(count, 4, dtype=torch.float64), torch.empty_like(like), torch.empty_like(like), double
        )


class _Chunk(NamedTuple):
    """Rows that are swept together. The logits of the first `lent` are held in d(lm_head)."""

    rows: slice
    lent: int

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


class TiledPass:
    """See head.py."""

    def __init__(self, head: Head) -> None:
        self.head, self.num_vocab = head, len(head.lm_head)
        self.num_tokens, self.width = head.hidden.shape
        self.single = head.hidden.dtype == torch.float32

    def stats(self) -> tuple[Tensor, Tensor, Tensor]:
        known = _Rows.of(self.head)
        for rows, columns, logits in self._tiles(whole_rows=False):
            self.head.logits(rows, columns, logits)
            self._stats(rows, columns, logits, known, None, None)
        return known.logprob, known.entropy, known.lse

    def backward(
        self, lse: Tensor, entropy: Tensor, grad_logprob: Tensor, grad_entropy: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple:
        gradients = self._gradients(needs)
        # d(hidden) adds up over the columns, in float32 inside a GEMM but in bfloat16 between two.
        for rows, columns, logits in self._tiles(whole_rows=not self.single):
            self.head.logits(rows, columns, logits)
            values = (each[rows] for each in (lse, entropy, grad_logprob, grad_entropy))
            self._grad(rows, columns, logits, logits, None, *values)
            gradients.add(rows, columns, logits)
        return gradients.results()

    def train(
        self, loss_gradient: Callable, needs: tuple[bool, bool, bool], entropy_has_gradient: bool
    ) -> tuple[Tensor, Tensor, tuple]:
        gradients, known = self._gradients(needs), _Rows.of(self.head)
        chunks = self._chunks(lends=gradients.lm_head is not None and self.single)
        size = max(self._work_elements(chunk) for chunk in chunks)
        work = scratch(self.head.hidden, size)
        keeps = self.single and self.head.softcap == 0.0 and not entropy_has_gradient
        for chunk in chunks:
            held = []
            for columns in self._columns(len(chunk), whole_rows=not self.single):
                tile, parts = self._held(chunk, columns, work, gradients.lm_head)
                self.head.logits(chunk.rows, columns, tile)
                for inside, store in parts:
                    rows = slice(chunk.rows.start + inside.start, chunk.rows.start + inside.stop)
                    kept, tops = (store, self._tops(store)) if keeps else (None, None)
                    self._stats(rows, columns, tile[inside], known, kept, tops)
                    if not keeps and chunk.lent:
                        store.copy_(tile[inside])
                    held.append((rows, inside, columns, tile, store, tops))
            grads = loss_gradient(chunk.rows, known.logprob[chunk.rows], known.entropy[chunk.rows])
            for rows, inside, columns, tile, store, tops in held:
                values = [known.lse[rows], known.entropy[rows], grads[0][inside], None if keeps else grads[1][inside]]
                self._grad(rows, columns, store, tile[inside], tops, *values)
                if rows.stop == chunk.rows.stop:  # the last part of this tile
                    gradients.add(chunk.rows, columns, tile)
        return known.logprob, known.entropy, gradients.results()

    def _gradients(self, needs: tuple[bool, bool, bool]) -> HeadGradients:
        return HeadGradients(self.head, needs, gradient_memory(self.head.lm_head) if needs[1] else None)

    def _row_bytes(self) -> int:
        # bfloat16 needs a float32 copy of d(logits) for d(lm_head), see HeadGradients.
        return self.num_vocab * (4 if self.single else 6)

    def _cached_rows(self, most: int) -> int:
        """At most `most`; fewer, so that their logits stay in the cache, where that streams lm_head less."""
        return max(1, min(most, max(CACHE_BYTES // self._row_bytes(), 4 * self.width)))

    def _columns(self, num_rows: int, whole_rows: bool) -> list[slice]:
        return spans(self.num_vocab, self.num_vocab if whole_rows else TILE_BYTES // (4 * num_rows), COLUMNS)

    def _tiles(self, whole_rows: bool) -> Iterator[tuple[slice, slice, Tensor]]:
        """Tiles that nothing holds, in a buffer that the next one overwrites."""
        most = WORK_BYTES // self._row_bytes() if whole_rows else MAX_ROWS
        for rows in spans(self.num_tokens, self._cached_rows(most)):
            count = rows.stop - rows.start
            for columns in self._columns(count, whole_rows):
                width = columns.stop - columns.start
                yield rows, columns, _matrix(scratch(self.head.hidden, count * width), count, width)

    def _chunks(self, lends: bool) -> list[_Chunk]:
        most, first = max(1, WORK_BYTES // self._row_bytes()), []
        if lends and most < self.num_tokens:
            lent = min(self.width, self.num_tokens)
            others = min(self.num_tokens - lent, (WORK_BYTES - TILE_BYTES) // self._row_bytes())
            if lent + others > most:
                first = [_Chunk(slice(0, lent + others), lent)]
        start = len(first[0]) if first else 0
        rest = spans(self.num_tokens - start, self._cached_rows(most)) if start < self.num_tokens else []
        return first + [_Chunk(slice(start + each.start, start + each.stop), 0) for each in rest]

    def _work_elements(self, chunk: _Chunk) -> int:
        if not chunk.lent:
            return len(chunk) * self.num_vocab
        tile = len(chunk) * self._columns(len(chunk), False)[0].stop
        return tile + (len(chunk) - chunk.lent) * self.num_vocab

    def _held(
        self, chunk: _Chunk, columns: slice, work: Tensor, grad_head: Tensor | None
    ) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
        """A chunk's tile, and where its numbers stay until d(logits) are made of them in the tile, by rows of it."""
        count, width = len(chunk), columns.stop - columns.start
        if not chunk.lent:
            tile = _matrix(work[count * columns.start :], count, width)
            return tile, [(slice(0, count), tile)]
        # These columns of d(lm_head) are H x C numbers that are written after what is held there was read.
        parts = [(slice(0, chunk.lent), _matrix(grad_head[columns].view(-1), chunk.lent, width))]
        others = count - chunk.lent
        if others:
            start = count * self._columns(count, False)[0].stop + others * columns.start
            parts.append((slice(chunk.lent, count), _matrix(work[start:], others, width)))
        return _matrix(work, count, width), parts

    def _tops(self, kept: Tensor) -> Tensor:
        return kept.new_empty(len(kept), -(-kept.shape[1] // BLOCK))

    def _stats(self, rows: slice, columns: slice, logits: Tensor, known: _Rows, *kept: Tensor | None) -> None:
        tile_stats(logits, *self._place(rows, columns), known.sums[rows], *kept, *(each[rows] for each in known[1:]))

    def _grad(self, rows: slice, columns: slice, logits: Tensor, out: Tensor, *values: Tensor | None) -> None:
        tile_grad(logits, out, *self._place(rows, columns), *values)

    def _place(self, rows: slice, columns: slice) -> tuple[int, int, Tensor, Tensor, float]:
        head = self.head
        return columns.start, self.num_vocab, head.target[rows], head.temperature[rows], head.softcap


def _matrix(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)
