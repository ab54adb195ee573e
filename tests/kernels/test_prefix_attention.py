"""prefix_attention on a CPU: the decomposition that a GPU runs too, through the CPU's leaf of the same signature."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ril_kernels import PackLayout, prefix_attention
from ril_kernels.prefix_attention import leaves
from ril_kernels.prefix_attention.reference import CASES, make_inputs, prefix_attention_reference

NAMES = ("query", "key", "value")
SMALL = [case for case in CASES if not case.startswith(("head", "peaked"))]


def with_grads(function, inputs: dict, grad_out: Tensor) -> list[Tensor]:
    """The output and its gradients by query, key and value."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES}
    out = function(**{**inputs, **leaves})
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad_out.to(out.dtype))]


def in_float64(inputs: dict) -> dict:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def grad_like(query: Tensor) -> Tensor:
    return torch.randn(query.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_hand_computed():
    # Prefix of values 1, 2; responses of values 6 and 9, 3. Queries of 0 weigh all that they read alike.
    layout = PackLayout.from_groups([(2, [1, 2])])
    query, key = torch.zeros(5, 1, 1), torch.randn(5, 1, 1)
    value = torch.tensor([1.0, 2.0, 6.0, 9.0, 3.0]).view(5, 1, 1).requires_grad_()
    out = prefix_attention(query, key, value, layout=layout)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.5, 3.0, 4.0, 3.75]))
    out.sum().backward()
    # Each value's weights: 1 + 1/2 + 1/3 + 1/3 + 1/4 for the first of the prefix, which all tokens read.
    expected = torch.tensor([29 / 12, 17 / 12, 1 / 3, 7 / 12, 1 / 4])
    torch.testing.assert_close(value.grad.flatten(), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", SMALL)
def test_gradcheck(case, backend):
    inputs = make_inputs(case, torch.float64)
    tensors = [inputs[name].requires_grad_() for name in NAMES]

    def function(*tensors):
        return prefix_attention(*tensors, layout=inputs["layout"], scale=inputs["scale"], backend=backend)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=case == "ragged")


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_definition_in_float64(case, repeats, monkeypatch):
    if repeats:  # as for a PyTorch before 2.9
        monkeypatch.setattr(leaves, "_TAKES_FEWER_KEY_HEADS", False)
    inputs = make_inputs(case, torch.float64)
    grad = grad_like(inputs["query"])
    for actual, truth in zip(
        with_grads(prefix_attention, inputs, grad),
        with_grads(prefix_attention_reference, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-11)


def sdpa(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float) -> Tensor:
    """PyTorch's own attention of each [prefix | response] alone, as a trainer without sharing computes it."""
    starts, out = layout.starts.tolist(), []
    for segment, prefix in enumerate(layout.prefix.tolist()):
        rows = torch.arange(starts[segment], starts[segment + 1])
        if prefix != segment:
            rows = torch.cat([torch.arange(starts[prefix], starts[prefix + 1]), rows])
        heads = [x[rows].transpose(0, 1) for x in (query, key, value)]
        alone = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)
        out.append(alone.transpose(0, 1)[-(starts[segment + 1] - starts[segment]) :])
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_accuracy_beside_pytorch(case, dtype, assert_accurate):
    inputs = make_inputs(case, dtype)
    grad = grad_like(inputs["query"]).to(dtype)
    truth = with_grads(prefix_attention_reference, in_float64(inputs), grad)
    peer = with_grads(sdpa, inputs, grad)
    actual = with_grads(prefix_attention, inputs, grad)
    for result in zip(actual, truth, peer, strict=True):
        assert result[0].dtype == dtype
        assert_accurate(*result)


def assert_private(function, inputs: dict) -> None:
    """No response's output or gradient depends on another response, and no prefix on any response."""
    layout = inputs["layout"]
    starts, prefix = layout.starts.tolist(), layout.prefix.tolist()
    weight = grad_like(inputs["query"])
    before = function(**inputs)
    for segment in range(len(prefix)):
        rows = slice(starts[segment], starts[segment + 1])
        changed = {name: inputs[name].clone() for name in NAMES}
        for x in changed.values():
            x[rows] += 1.0
        same = (function(**{**inputs, **changed}) == before).flatten(1).all(1)
        leaves = {name: inputs[name].clone().requires_grad_() for name in NAMES}
        (function(**{**inputs, **leaves})[rows] * weight[rows]).sum().backward()
        for other in range(len(prefix)):
            others = slice(starts[other], starts[other + 1])
            if other != segment and prefix[other] != segment:
                assert same[others].all(), f"segment {other} read segment {segment}"
            if other not in (segment, prefix[segment]):
                grads = [leaf.grad[others] for leaf in leaves.values()]
                assert not any(grad.any() for grad in grads), f"segment {segment} has a gradient in {other}"


def leaky(query, key, value, layout, scale):
    """Wrong on purpose: the responses of a group as if they were one, so that each reads those before it."""
    starts, prefix = layout.starts, layout.prefix
    first = torch.tensor([p == s or prefix[s - 1] != p or s - 1 == p for s, p in enumerate(prefix.tolist())])
    kept = first.nonzero().squeeze(1)
    merged = PackLayout(torch.cat([starts[:-1][kept], starts[-1:]]), (first.cumsum(0) - 1)[prefix[kept]])
    return prefix_attention(query, key, value, layout=merged, scale=scale)


@pytest.mark.parametrize("function", [prefix_attention, prefix_attention_reference])
def test_no_response_reads_another(function):
    assert_private(function, make_inputs("ragged", torch.float64))


def test_a_leak_is_seen(assert_accurate):
    inputs = make_inputs("ragged", torch.float64)
    with pytest.raises(AssertionError, match="segment 2 read segment 1"):
        assert_private(leaky, inputs)
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_accurate(leaky(**inputs), prefix_attention_reference(**inputs))


def test_readers_need_not_follow_their_prefix():
    # Segments of 2, 1, 3, 2, 1 tokens; 0 and 4 read 2, 3 reads 1.
    layout = PackLayout(torch.tensor([0, 2, 3, 6, 8, 9]), torch.tensor([2, 1, 2, 1, 2]))
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 9, 2, 4, generator=generator, dtype=torch.float64)
    inputs = {"query": query, "key": key, "value": value, "layout": layout, "scale": 0.5}
    grad = grad_like(query)
    for actual, truth in zip(
        with_grads(prefix_attention, inputs, grad),
        with_grads(prefix_attention_reference, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(actual, truth)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_input_alone_has_a_gradient(wanted):
    inputs = make_inputs("ragged", torch.float64)
    grad = grad_like(inputs["query"])
    leaf = inputs[wanted].clone().requires_grad_()
    prefix_attention(**{**inputs, wanted: leaf}).backward(grad)
    truth = with_grads(prefix_attention_reference, inputs, grad)[1 + NAMES.index(wanted)]
    torch.testing.assert_close(leaf.grad, truth)


def test_any_strides():
    """Views of a fused projection, elements of a head apart, and the gradient of a sum, whose strides are 0."""
    inputs = make_inputs("ragged", torch.float64)
    truth = with_grads(prefix_attention_reference, inputs, torch.ones_like(inputs["query"]))
    apart = {name: inputs[name].transpose(1, 2).contiguous().transpose(1, 2) for name in NAMES}
    fused = torch.cat([inputs[name] for name in NAMES], dim=1)
    views = dict(zip(NAMES, fused.split([inputs[name].shape[1] for name in NAMES], dim=1), strict=True))
    for strided in (apart, views):
        leaves = {name: x.detach().requires_grad_() for name, x in strided.items()}
        out = prefix_attention(**{**inputs, **leaves})
        out.sum().backward()
        for actual, expected in zip((out, *(x.grad for x in leaves.values())), truth, strict=True):
            torch.testing.assert_close(actual, expected)


def test_every_element_is_written():
    """Under deterministic algorithms PyTorch fills what it allocates with NaN."""
    inputs = make_inputs("ragged")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = with_grads(prefix_attention, inputs, grad_like(inputs["query"]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in results)


class Allocated(TorchDispatchMode):
    """Counts the elements of every op's outputs, and keeps the largest output."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.total += sum(sizes)
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize("group", [(16, [4, 3, 5]), (0, [2, 6])])
def test_cost_is_linear_in_groups(group):
    def allocated(num_groups: int) -> tuple[int, int, int]:
        layout = PackLayout.from_groups([group] * num_groups)
        query, key, value = (torch.randn(layout.num_tokens, heads, 4, requires_grad=True) for heads in (4, 2, 2))
        layout.plan(query.device)
        with Allocated() as mode:
            prefix_attention(query, key, value, layout=layout).sum().backward()
        return mode.total, mode.largest, query.numel()

    (few, _, _), (many, largest, num_query) = allocated(20), allocated(80)
    assert many <= 4.1 * few
    assert largest <= num_query  # nothing of size (T, T), which is larger here


def error_cases() -> list:
    x = torch.zeros(6, 2, 4)
    return [
        ({"query": x[None]}, ValueError, r"query: got shape \(1, 6, 2, 4\), expected \(T, Hq, D\)\. Pack the tokens"),
        ({"query": x.int()}, TypeError, r"query: got dtype int32, expected float32 or"),
        ({"key": x.double()}, TypeError, r"key: got dtype float64, expected float32\. Cast it to query's dtype"),
        ({"value": x[:5]}, ValueError, r"value: got shape \(5, 2, 4\), .* with T = 6 as in query"),
        ({"value": x[:, :1]}, ValueError, r"value: got shape \(6, 1, 4\), .*Hkv = 2 as in key.*as projected, not rep"),
        ({"key": x[..., :2]}, ValueError, r"key: got shape \(6, 2, 2\), .*D = 4 as in query"),
        ({"key": x.to("meta")}, ValueError, r"key: got device meta, expected cpu, where query is"),
        ({"query": torch.zeros(6, 3, 4)}, ValueError, r"query: got Hq = 3 heads, expected a multiple of key's Hkv = 2"),
        ({"layout": [(6, [])]}, TypeError, r"layout: got list, expected a PackLayout\. PackLayout\.from_groups"),
        ({"layout": PackLayout.from_groups([(6, [1])])}, ValueError, r"layout: got a layout of 7 tokens, .*T = 6 tok"),
        ({"scale": 0.0}, ValueError, r"scale: got 0\.0, expected a finite number above 0"),
        ({"backend": "sdpa"}, ValueError, r"backend: got 'sdpa', expected one of 'auto', 'reference', 'cpu', 'torch'"),
        ({"backend": "torch"}, ValueError, r"backend: got 'torch' for float32 on cpu, expected bfloat16 or float16 on"),
        ({"backend": "flash_attn"}, ValueError, r"backend: got 'flash_attn' for float32 on cpu, expected bfloat16 o"),
    ]


@pytest.mark.parametrize(("changes", "error", "message"), error_cases())
def test_errors(changes, error, message):
    x = torch.zeros(6, 2, 4)
    good = {"query": x, "key": x, "value": x, "layout": PackLayout.from_groups([(4, [1, 1])])}
    prefix_attention(**good)
    with pytest.raises(error, match=message):
        prefix_attention(**{**good, **changes})


def test_cpu_backend_elsewhere():
    x = torch.zeros(6, 2, 4, device="meta")
    with pytest.raises(ValueError, match=r"backend: got 'cpu' for float32 on meta, expected tensors on the CPU"):
        prefix_attention(x, x, x, layout=PackLayout.from_groups([(6, [])]), backend="cpu")
