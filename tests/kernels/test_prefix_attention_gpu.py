"""prefix_attention on a GPU: without one, that nothing waits and nothing is (T, T); with one, its numbers."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ril_kernels import PackLayout, prefix_attention
from ril_kernels.prefix_attention.op import resolve_backend
from ril_kernels.prefix_attention.reference import CASES, make_inputs, prefix_attention_reference

NAMES = ("query", "key", "value")


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.cpu(),
        lambda x: torch.arange(3).to(x.device),
        lambda x: torch.arange(3).to(x.device, non_blocking=True),
        lambda x: torch.arange(3).pin_memory().to(x.device),
        lambda x: torch.empty(3).copy_(x),
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ],
)
def test_a_sync_is_seen(fake_gpu, sync):
    with fake_gpu(), pytest.raises((AssertionError, RuntimeError)):
        sync(torch.ones(3, device="cuda"))


def forward_and_backward(inputs: dict) -> tuple[Tensor, tuple]:
    """Backward by its node, since autograd's engine asks for a CUDA context, which fake tensors do without."""
    out = prefix_attention(**inputs)
    return out, out.grad_fn.apply(torch.ones_like(out))[:3]


def fake_inputs(layout: PackLayout, dtype: torch.dtype, head_size: int = 64) -> dict:
    shapes = {"query": 4, "key": 2, "value": 2}
    return {
        "layout": layout,
        **{
            name: torch.empty(layout.num_tokens, heads, head_size, device="cuda", dtype=dtype, requires_grad=True)
            for name, heads in shapes.items()
        },
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [[(16, [4, 3])], [(16, [4, 3]), (9, [5]), (0, [2])], [(0, [2, 3])], [(5, [])]])
def test_nothing_waits(fake_gpu, groups, dtype):
    layout = PackLayout.from_groups(groups)
    with fake_gpu():
        inputs = fake_inputs(layout, dtype)
        assert resolve_backend("auto", inputs["query"]) == "torch"
        out, grads = forward_and_backward(inputs)
    for result, name in zip((out, *grads), ("query", *NAMES), strict=True):
        assert (result.shape, result.dtype, result.device) == (inputs[name].shape, dtype, inputs[name].device)


def test_memory_is_linear(fake_gpu):
    layout = PackLayout.from_groups([(64, [16] * 8)] * 40)
    with fake_gpu() as mode:
        inputs = fake_inputs(layout, torch.bfloat16, head_size=8)
        forward_and_backward(inputs)
    assert max(mode.sizes) <= inputs["query"].numel() < layout.num_tokens**2


@pytest.mark.parametrize("head_size", [12, 264])
def test_head_size_errors(fake_gpu, head_size):
    layout = PackLayout.from_groups([(4, [2])])
    message = rf"query: got head size {head_size}, expected a multiple of 8, at most 256, for backend 'torch'\. Use"
    with fake_gpu(), pytest.raises(ValueError, match=message):
        prefix_attention(**fake_inputs(layout, torch.bfloat16, head_size))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attn_not_installed(fake_gpu):
    layout = PackLayout.from_groups([(4, [2])])
    message = r"backend: got 'flash_attn', expected flash-attn to be installed\. Install it"
    with fake_gpu(), pytest.raises(ValueError, match=message):
        prefix_attention(**fake_inputs(layout, torch.bfloat16), backend="flash_attn")


def test_float32_takes_the_definition(fake_gpu):
    with fake_gpu():
        assert resolve_backend("auto", torch.empty(1, 1, 8, device="cuda")) == "reference"


def masked_sdpa(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float) -> Tensor:
    """PyTorch's own attention in the same dtype, with a (T, T) mask."""
    segment = torch.arange(len(layout.prefix)).repeat_interleave(layout.starts.diff())
    same = segment[:, None] == segment
    reads = (same & torch.ones_like(same).tril()) | (~same & (layout.prefix[segment][:, None] == segment))
    heads = [x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)]
    out = F.scaled_dot_product_attention(*heads, attn_mask=reads.to(query.device), scale=scale, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def with_grads(function, inputs: dict, grad_out: Tensor) -> list[Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES}
    out = function(**{**inputs, **leaves})
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "flash_attn"])
@pytest.mark.parametrize("case", [case for case, (*_, head_size, _) in CASES.items() if head_size % 8 == 0])
def test_accuracy_on_gpu(case, backend, dtype, assert_accurate):
    if backend == "flash_attn" and find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    inputs = make_inputs(case, dtype)
    inputs = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    grad = torch.randn(inputs["query"].shape, generator=torch.Generator().manual_seed(1)).to(inputs["query"])
    results = (
        with_grads(lambda **inputs: prefix_attention(**inputs, backend=backend), inputs, grad),
        with_grads(prefix_attention_reference, wide, grad),
        with_grads(masked_sdpa, inputs, grad),
    )
    for actual, truth, peer in zip(*results, strict=True):
        assert_accurate(actual, truth, peer)
