"""The tolerance rule of the kernels' tests, and memory that shows what was not written."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ril_kernels import _native
from ril_kernels.token_logprob import memory

# One floor per dtype, times the largest magnitude of the truth (or 1).
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _assert_accurate(actual: Tensor, truth: Tensor, peer: Tensor | None = None) -> None:
    """Error of `actual` against a float64 truth: at most 3 times that of `peer`, PyTorch's own op in the same
    dtype, plus the floor of the dtype."""
    assert truth.dtype == torch.float64 and actual.shape == truth.shape
    assert not actual.isnan().any(), "the output holds NaN: an element was not written, or is wrong"
    error = (actual.double() - truth).abs().max()
    allowed = FLOOR[actual.dtype] * max(1.0, float(truth.abs().max()))
    if peer is not None:
        allowed += 3 * float((peer.double() - truth).abs().max())
    assert float(error) <= allowed, f"error {float(error):.3g} above the allowed {allowed:.3g}"


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    return _assert_accurate


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, here only a side effect of this switch: what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    memory.release()
    assert torch.empty(3).isnan().all() and torch.zeros(2, 3).new_empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def native_calls(monkeypatch) -> list[str]:
    """Names of the C++ functions that a test calls, in order."""
    names, call = [], _native.call
    monkeypatch.setattr(_native, "call", lambda name, *arguments: (names.append(name), call(name, *arguments)))
    return names
