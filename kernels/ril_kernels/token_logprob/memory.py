"""Memory that this thread keeps from call to call of the pass on a CPU: of its tiles, and of the last d(lm_head)."""

import threading

import torch
from torch import Tensor

from ril_kernels import _native

HUGE_FROM = 8 * 2**20  # bytes from which a buffer asks for huge pages

_kept = threading.local()


def release() -> None:
    """Give back what this thread has kept: at most WORK_BYTES of tiles.py or one tile, and one d(lm_head)."""
    vars(_kept).clear()


def scratch(like: Tensor, elements: int) -> Tensor:
    """Uninitialised memory for this call, of the dtype of `like`. On the small benchmark case new pages cost twice as
    much as the GEMMs."""
    if torch.compiler.is_compiling():
        return like.new_empty(elements)
    needed, memory = elements * like.element_size(), getattr(_kept, "memory", None)
    if memory is None or memory.nbytes < needed:
        memory = _kept.memory = _huge(torch.empty(needed, dtype=torch.uint8, device=like.device))
    return memory[:needed].view(like.dtype)


def gradient_memory(lm_head: Tensor) -> Tensor:
    """Uninitialised float32 memory of the shape of lm_head: the last call's, if nothing else holds a part of it.

    A virtual machine that gives free pages back to its host took a fifth of the GEMMs' time to get them again.
    """
    num_bytes = lm_head.numel() * 4
    if torch.compiler.is_compiling() or num_bytes < HUGE_FROM:
        return torch.empty_like(lm_head, dtype=torch.float32)
    storage = getattr(_kept, "gradient", None)
    if storage is None or storage.nbytes() != num_bytes or num_holders(storage) != 1:
        new = torch.empty(num_bytes, dtype=torch.uint8, device=lm_head.device)
        storage = _kept.gradient = _huge(new).untyped_storage()
    return torch.empty(0, dtype=torch.float32, device=lm_head.device).set_(storage, 0, lm_head.shape)


def num_holders(storage: torch.UntypedStorage) -> int:
    """Of `storage`, this variable included: tensors, views of them, arrays that NumPy made of them. One who
    holds nothing but `tensor.untyped_storage()` is not counted."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count(storage._cdata) if count is not None else 2


def _huge(memory: Tensor) -> Tensor:
    if memory.nbytes >= HUGE_FROM:
        _native.call("ril_huge_pages", memory.data_ptr(), memory.nbytes)
    return memory
