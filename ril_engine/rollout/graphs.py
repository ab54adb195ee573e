"""CUDA graphs behind one call; on other devices the same function just runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class Graphs:
    """One graph per key, captured at its first use, all in one memory pool.

    A graph reads and writes the addresses that it was captured with: `keep` says what those are, and a graph is dropped
    when one of them has moved.
    """

    def __init__(self):
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._addresses: tuple[int, ...] = ()
        self._pool = self._stream = None

    def __len__(self) -> int:
        return len(self._graphs)

    def keep(self, tensors: Sequence[Tensor]) -> None:
        addresses = tuple(each.data_ptr() for each in tensors)
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses

    def clear(self) -> None:
        self._graphs.clear()
        self._pool = None  # it goes with the last graph in it

    def run(self, key: Hashable, step: Callable[[], Tensor], state: Sequence[Tensor]) -> Tensor:
        """What `step` returns, which the next run of this key overwrites. `state` is what a step changes."""
        if not state[0].is_cuda:
            return step()
        if key not in self._graphs:
            self._graphs[key] = self._capture(step, state)
        graph, out = self._graphs[key]
        graph.replay()
        return out

    def _capture(self, step: Callable[[], Tensor], state: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # A step compiles kernels and makes workspaces at its first run, which a capture cannot; it then starts anew.
        before = [each.clone() for each in state]
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # the one that captures, so that its workspaces exist by then
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        for each, value in zip(state, before, strict=True):
            each.copy_(value)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = step()
        return graph, out
