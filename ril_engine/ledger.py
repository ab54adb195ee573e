"""Counts memory and time of code that runs on tensors without contents: no GPU and no weights are needed.

Every op that PyTorch dispatches goes through a `Ledger`. What is computed from the host's values alone (token ids,
lengths, grids) is really computed, wherever it would lie, for models read it back. What meets a weight is a fake tensor
on `device`, without a value: one of FakeTensorMode for "cpu". For a GPU `device` is "meta", since autograd runs no
backward of fake tensors on "cuda" where there is none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

FLASH = 1  # of torch.nn.attention.SDPBackend: what a GPU takes where there is no mask
aten = torch.ops.aten
READ_ROWS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default)
WRITE_ROWS = (aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class Ledger(TorchDispatchMode):
    """Of the storages made on `device` within it: `live` and `peak` bytes.

    Of the ops: `flops`, `moved` bytes, and `seconds` by a roofline: each op takes as long as its products at
    `flops_per_s` of its dtype (float32's, where it is not named) or as its operands and results at `bytes_per_s`,
    whichever is longer.
    """

    def __init__(self, device: str, flops_per_s: dict[torch.dtype, float], bytes_per_s: float):
        super().__init__()
        self.device, self.flops_per_s, self.bytes_per_s = device, flops_per_s, bytes_per_s
        self.fake = FakeTensorMode(allow_non_fake_inputs=True) if device == "cpu" else nullcontext()
        self.live = self.peak = 0
        self.flops = self.moved = self.seconds = 0.0
        self._held: dict[int, weakref.ref] = {}  # of storages, by their address

    def restart(self) -> None:
        """Begin a phase: what is live now is its peak so far, and no op has run."""
        self.peak = self.live
        self.flops = self.moved = self.seconds = 0.0

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these, if they lie on the device, until they are gone."""
        for each in tensors:
            if each.device.type != self.device:
                continue
            storage = each.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._held:
                self._held[key] = weakref.ref(storage, partial(self._gone, key, size))
                self.live += size
        self.peak = max(self.peak, self.live)

    def overlook(self, tensors: Iterable[Tensor]) -> None:
        """Count no storage of these, which something else stands for, and no view of them."""
        for each in tensors:
            storage = each.untyped_storage()
            key = storage._cdata
            self._held[key] = weakref.ref(storage, partial(self._gone, key, 0))

    def _gone(self, key: int, size: int, _) -> None:
        del self._held[key]
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func is aten._fused_sdp_choice.default:
            return FLASH
        asked = kwargs.get("device")
        moves = asked is not None and torch.device(asked).type != "cpu"
        if all(_value(each) is not None for each in given) and not (moves and not given and _is_float(func, kwargs)):
            out = self._known(func, args, kwargs, moves or any(_is_empty(each) for each in given))
        else:
            out = func(*tree_map_only(Tensor, self._there, args), **tree_map_only(Tensor, self._there, kwargs))
            if func._schema.is_mutable and isinstance(out, Tensor):
                out = kwargs.get("out", args[0] if args else out)  # the one that the caller holds
                if _is_empty(out):
                    out.value = None
        results = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.hold(results)
        self._time(func, args, kwargs, given, results, out)
        return out

    def _known(self, func, args, kwargs, there: bool):
        """Computed for real; the results are on the device if `there`, and their values are still known."""
        with unset_fake_temporarily():
            host = {"device": "cpu"} if kwargs.get("device") is not None else {}
            values = tree_map_only(Tensor, _value, (args, kwargs | host))
            out = values[0][0].clone() if func is aten._pin_memory.default else func(*values[0], **values[1])
        if func._schema.is_mutable and isinstance(out, Tensor):
            return kwargs.get("out", args[0])
        if there and self.device != "cpu":
            return tree_map_only(Tensor, self._there, out)
        return out

    def _there(self, tensor: Tensor) -> Tensor:
        """A host's tensor as if it had been copied to the device; what it holds is kept beside it."""
        if self.device == "cpu" or _is_empty(tensor):
            return tensor
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        copy.value = tensor
        return copy

    def _time(self, func, args, kwargs, given: list[Tensor], results: list[Tensor], out) -> None:
        fakes = [each for each in given if _is_empty(each)]
        if not fakes or (not func._schema.is_mutable and _views(fakes, results)):
            return
        count = flop_registry.get(func._overloadpacket)
        flops = float(count(*args, **kwargs, out_val=out)) if count is not None else 0.0
        touched = [*fakes, *results]
        if func in READ_ROWS:
            touched = [*results, *results]
        elif func in WRITE_ROWS:
            touched = [args[2], args[2]]
        moved = float(sum(each.numel() * each.element_size() for each in touched))
        rate = self.flops_per_s.get(fakes[0].dtype, self.flops_per_s[torch.float32])
        self.flops, self.moved = self.flops + flops, self.moved + moved
        self.seconds += max(flops / rate, moved / self.bytes_per_s)


def _views(given: list[Tensor], results: list[Tensor]) -> bool:
    """Whether an op made no storage, so moved nothing."""
    there = {each.untyped_storage()._cdata for each in given}
    return all(each.untyped_storage()._cdata in there for each in results)


def _is_empty(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _value(tensor: Tensor) -> Tensor | None:
    """What a tensor holds, where that is known."""
    return getattr(tensor, "value", None) if _is_empty(tensor) else tensor


def _is_float(func, kwargs) -> bool:
    """Of a factory: whether it makes numbers that no model reads on the host."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return func is not aten.arange.default and func is not aten.arange.start and dtype.is_floating_point


@contextmanager
def counted(ledger: Ledger) -> Iterator[Ledger]:
    """Run with tensors that have no contents, each op of it in the ledger."""
    with ledger.fake, ledger:
        yield ledger
