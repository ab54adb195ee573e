"""Which packed token reads which: PackLayout, and the same as the attention kernels take it.

T packed tokens, S segments, N sequences of one attention call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ril_kernels._checks import check_tensor, refuse
from ril_kernels.copies import to_device

CPU = torch.device("cpu")


class Sequences(NamedTuple):
    """N query sequences, the rows of a tensor, and the N key sequences that they read, the rows of another.

    A kernel reads the offsets on the device; its launch needs the longest lengths, which come from the host.
    """

    cu_queries: Tensor  # (N + 1,) int32, offsets
    cu_keys: Tensor  # (N + 1,) int32
    max_queries: int
    max_keys: int
    causal: bool
    runs: tuple[tuple[int, int, int], ...]  # how many side by side have as many queries and as many keys: N, Tq, Tk


class Plan(NamedTuple):
    """The two attention calls of a layout. Rows are a slice, so a view, where they lie one after the other."""

    own: Sequences  # every segment reads itself, causally: all T rows
    shared: Sequences | None  # per prefix with readers: the tokens of all of them read its tokens
    readers: slice | Tensor  # rows of the queries of `shared`
    prefixes: slice | Tensor  # rows of its keys


@dataclass(frozen=True, eq=False)
class PackLayout:
    """Segments one after the other over the T packed tokens, and the prefix that each of them reads.

    A token reads its own segment up to itself, and all of its segment's prefix. A prefix reads nothing but itself.
    Index tensors are made at the first use on a device and kept: make one layout per pack, not one per layer.
    Raises TypeError or ValueError, naming the argument.
    """

    starts: Tensor  # (S + 1,) int64 on the CPU: offsets, starts[0] = 0, starts[S] = T
    prefix: Tensor  # (S,) int64 on the CPU: the segment that this one reads too, or its own number
    num_tokens: int = field(init=False)  # T
    _plans: dict[torch.device, Plan] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        remedy = "PackLayout.from_groups makes it from lengths."
        for name, value in (("starts", self.starts), ("prefix", self.prefix)):
            check_tensor(name, value, (torch.int64,), remedy)
            if value.device != CPU:
                refuse(name, f"device {value.device}", "a CPU tensor", "Lengths are known where the pack is built.")
        starts, prefix = self.starts, self.prefix
        if starts.dim() != 1 or len(starts) < 2:
            refuse("starts", f"shape {tuple(starts.shape)}", "(S + 1,) with at least one segment", remedy)
        if starts[0] != 0 or bool((starts.diff() < 1).any()):
            refuse("starts", starts.tolist(), "offsets that begin at 0 and rise", remedy)
        num_segments = len(starts) - 1
        if prefix.shape != (num_segments,):
            refuse("prefix", f"shape {tuple(prefix.shape)}", f"(S,) with S = {num_segments} as in starts", remedy)
        if prefix.min() < 0 or prefix.max() >= num_segments:
            refuse("prefix", prefix.tolist(), f"segments in [0, {num_segments})", remedy)
        if not torch.equal(prefix[prefix], prefix):
            refuse("prefix", prefix.tolist(), "prefixes that read nothing but themselves", remedy)
        object.__setattr__(self, "num_tokens", int(starts[-1]))
        object.__setattr__(self, "_plans", {CPU: _host_plan(starts, prefix)})

    @classmethod
    def from_groups(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> PackLayout:
        """Per group the length of its prefix, 0 for none, and of its responses: [prefix | response 1 | ...] each."""
        lengths: list[int] = []
        prefix: list[int] = []
        for index, (num_prefix, num_response) in enumerate(groups):
            if num_prefix < 0 or any(length < 1 for length in num_response):
                expected = "a prefix of at least 0 tokens and responses of at least 1"
                refuse(f"groups[{index}]", (num_prefix, list(num_response)), expected, "Leave out empty responses.")
            first = len(lengths)
            lengths += ([num_prefix] if num_prefix else []) + list(num_response)
            prefix += [first if num_prefix else segment for segment in range(first, len(lengths))]
        if not lengths:
            refuse("groups", "no token", "at least one", "Skip an empty pack.")
        return cls(torch.tensor([0, *lengths]).cumsum(0), torch.tensor(prefix))

    def plan(self, device: torch.device) -> Plan:
        """The two calls, with their index tensors on `device`; no host sync."""
        if device not in self._plans:
            self._plans[device] = _to(device, self._plans[CPU])
        return self._plans[device]


def _to(device: torch.device, value: object) -> object:
    if isinstance(value, Tensor):
        return to_device(value, device)
    return type(value)(*(_to(device, part) for part in value)) if hasattr(value, "_fields") else value


def _host_plan(starts: Tensor, prefix: Tensor) -> Plan:
    lengths = starts.diff()
    own = _sequences(lengths, lengths, causal=True)
    readers = (prefix != torch.arange(len(prefix))).nonzero().squeeze(1)
    if len(readers) == 0:
        return Plan(own, None, slice(0), slice(0))
    readers = readers[prefix[readers].argsort(stable=True)]  # those of one prefix side by side
    prefixes, owner = prefix[readers].unique_consecutive(return_inverse=True)
    num_read = torch.zeros_like(prefixes).index_add_(0, owner, lengths[readers])
    shared = _sequences(num_read, lengths[prefixes], causal=False)
    return Plan(own, shared, _rows(starts, readers), _rows(starts, prefixes))


def _sequences(num_queries: Tensor, num_keys: Tensor, *, causal: bool) -> Sequences:  # lengths, (N,) each
    cu_queries, cu_keys = (torch.cat([n.new_zeros(1), n.cumsum(0)]).int() for n in (num_queries, num_keys))
    lengths = groupby(zip(num_queries.tolist(), num_keys.tolist(), strict=True))
    runs = tuple((sum(1 for _ in run), *each) for each, run in lengths)
    return Sequences(cu_queries, cu_keys, int(num_queries.max()), int(num_keys.max()), causal, runs)


def _rows(starts: Tensor, segments: Tensor) -> slice | Tensor:
    first, last = starts[segments], starts[segments + 1]
    if torch.equal(first[1:], last[:-1]):
        return slice(int(first[0]), int(last[-1]))
    return torch.cat([torch.arange(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True)])
