"""What every test shares: few threads, and a reason for each test that cannot run here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Where there is a GPU, only the tests marked so take it; the processes that others start have this from here, too.
os.environ["DS_ACCELERATOR"] = "cpu"
# Workers of pytest-xdist run side by side, one per core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


# Files that take longest, the longest first: a worker that gets one of them last would be waited for.
LONGEST = (
    "test_main_job",
    "test_survival",
    "test_triton",
    "test_plan",
    "test_benchmarks",
    "test_ranks",
    "test_loop",
    "test_packed_forward",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session")
def alone():
    """A job of one rank in this process: DeepSpeed cannot start twice, so all tests share it."""
    from ril_engine.engine import init_distributed

    environment, threads = dict(os.environ), torch.get_num_threads()
    init_distributed()
    torch.set_num_threads(threads)
    os.environ.clear()  # what it sets is not for the processes that other tests start
    os.environ.update(environment, LOCAL_RANK="0")  # but deepspeed.initialize asks for this one


class NoWaits(TorchDispatchMode):
    """Refuses what fake tensors allow and a host would wait for: copies from the GPU, and copies to it but for
    non-blocking ones from pinned memory. Keeps the sizes of what the ops make.

    `gpu`: "cuda" for fake tensors, or "meta", which autograd runs without a GPU; nothing is pinned for that."""

    def __init__(self, gpu: str = "cuda") -> None:
        super().__init__()
        self.gpu = gpu
        self.sizes: list[int] = []
        self.pinned: list[Tensor] = []

    def pin(self, x: Tensor) -> Tensor:
        self.pinned.append(x)
        return x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_host = [x for x in given if x.device.type == "cpu"]
        there, here = ([x for x in some if x.device.type == self.gpu] for some in (given, made))
        if there and len(here) < len(made):
            raise AssertionError(f"{func} copies from the GPU to the host")
        if on_host and here:
            pinned = self.gpu == "meta" or all(any(x is y for y in self.pinned) for x in on_host)
            assert pinned and kwargs.get("non_blocking"), f"{func} copies to the GPU and waits"
        self.sizes += [x.numel() for x in made]
        return result


@contextmanager
def _fake_gpu() -> Iterator[NoWaits]:
    """CUDA tensors of shapes and dtypes only, no GPU needed: PyTorch's fake kernels, which read no values."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), NoWaits() as mode:
        patch.setattr(Tensor, "pin_memory", lambda x: mode.pin(x))  # has no fake kernel
        yield mode


@pytest.fixture
def fake_gpu():
    return _fake_gpu


@pytest.fixture
def no_waits():
    return NoWaits
