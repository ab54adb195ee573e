"""prefix_attention: the public function, its validation, and what makes one attention out of two calls.

T packed tokens, Hq query heads, Hkv key heads, D head size.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ril_kernels._checks import (
    FLOAT_DTYPES,
    Shapes,
    check_choice,
    check_device,
    check_number,
    check_tensor,
    dtype_name,
    refuse,
)
from ril_kernels.prefix_attention.layout import PackLayout, Plan
from ril_kernels.prefix_attention.leaves import LEAVES, Leaf
from ril_kernels.prefix_attention.reference import prefix_attention_reference

BACKENDS = ("auto", "reference", *LEAVES)
_GPU_DTYPES = (torch.bfloat16, torch.float16)
_MAX_GPU_HEAD_SIZE = 256


class _PrefixAttention(torch.autograd.Function):
    """Every segment reads itself in one call and, for those with a prefix, the prefix in another. All tokens that read
    one prefix are one sequence of queries of that call, so its keys are read, and its d(key) and d(value) summed, once
    per group. With log-sum-exps l1, l2 of the two softmaxes, that over both has log(e^l1 + e^l2), and its output is
    their outputs weighted by e^l1 and e^l2.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, plan: Plan, leaf: Leaf, scale: float) -> Tensor:
        out, lse = leaf.forward(query, key, value, plan.own, scale)
        if plan.shared is not None:
            rows, keys = plan.readers, plan.prefixes
            own_out, own_lse = out[rows], lse[:, rows]
            shared_out, shared_lse = leaf.forward(query[rows], key[keys], value[keys], plan.shared, scale)
            weight = torch.sigmoid(shared_lse - own_lse).T.unsqueeze(2)
            out[rows] = torch.lerp(own_out.to(weight.dtype), shared_out.to(weight.dtype), weight).to(out.dtype)
            lse[:, rows] = torch.logaddexp(own_lse, shared_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.leaf, ctx.scale = plan, leaf, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple:
        query, key, value, out, lse = ctx.saved_tensors
        plan, leaf = ctx.plan, ctx.leaf
        grad_out = _with_adjacent_elements(grad_out)
        grads = leaf.backward(grad_out, query, key, value, out, lse, plan.own, ctx.scale)
        if plan.shared is not None:
            rows, keys = plan.readers, plan.prefixes
            shared = (grad_out[rows], query[rows], key[keys], value[keys], out[rows], lse[:, rows].contiguous())
            parts = leaf.backward(*shared, plan.shared, ctx.scale)
            for grad, where, part in zip(grads, (rows, keys, keys), parts, strict=True):
                grad[where] += part
        return *grads, None, None, None


def _with_adjacent_elements(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def resolve_backend(backend: str, query: Tensor) -> str:
    """The form that runs: for "auto" a function of device and dtype alone. A named one that cannot run raises."""
    device = query.device.type
    runs_on_gpu = device == "cuda" and query.dtype in _GPU_DTYPES
    if backend == "auto":
        backend = "cpu" if device == "cpu" else "torch" if runs_on_gpu else "reference"
    got = f"{backend!r} for {dtype_name(query.dtype)} on {query.device}"
    if backend == "cpu" and device != "cpu":
        refuse("backend", got, "tensors on the CPU", "Use backend='auto'.")
    if backend in ("torch", "flash_attn"):
        if not runs_on_gpu:
            refuse("backend", got, "bfloat16 or float16 on a CUDA device", "Use backend='auto'.")
        head_size = query.shape[2]
        if head_size % 8 or head_size > _MAX_GPU_HEAD_SIZE:
            expected = f"a multiple of 8, at most {_MAX_GPU_HEAD_SIZE}, for backend {backend!r}"
            refuse("query", f"head size {head_size}", expected, "Use backend='reference', or pad the heads.")
    if backend == "flash_attn" and find_spec("flash_attn") is None:
        refuse("backend", "'flash_attn'", "flash-attn to be installed", "Install it, or use backend='torch'.")
    return backend


def prefix_attention(
    query: Tensor,  # (T, Hq, D)
    key: Tensor,  # (T, Hkv, D), Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv)
    value: Tensor,  # (T, Hkv, D)
    *,
    layout: PackLayout,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # (T, Hq, D)
    """Attention of a pack of groups whose responses share a prefix; differentiable once, no (T, T) mask or weights.

    A token reads its own segment up to itself and, in a response, the group's whole prefix: what it would read in a
    sequence [prefix | response]. Positions are the caller's (rotary embeddings come before). float32, float64,
    bfloat16 or float16; `scale` multiplies query . key and is D**-0.5 by default.

    `backend`: auto is "cpu" on a CPU, "torch" (FlashAttention as PyTorch ships it) for bfloat16 and float16 on a CUDA
    device, and "reference", which does hold (Hq, T, T) weights, for everything else. "flash_attn" calls that package.
    Head sizes on a GPU are multiples of 8 up to 256. Raises TypeError or ValueError, naming the argument.
    """
    shapes = Shapes()
    check_tensor("query", query, FLOAT_DTYPES, "Pass what the attention layer projects.")
    shapes.check("query", query, "T Hq D", "Pack the tokens: no batch, and heads after tokens.")
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, (query.dtype,), "Cast it to query's dtype.")
        check_device(name, tensor, "query", query.device)
        shapes.check(name, tensor, "T Hkv D", "Pass the heads as projected, not repeated.")
    size = shapes.size
    if size["Hq"] % size["Hkv"]:
        expected = f"a multiple of key's Hkv = {size['Hkv']}"
        refuse("query", f"Hq = {size['Hq']} heads", expected, "Every key head serves as many query heads.")
    if not isinstance(layout, PackLayout):
        remedy = "PackLayout.from_groups makes one."
        refuse("layout", type(layout).__name__, "a PackLayout", remedy, error=TypeError)
    if layout.num_tokens != size["T"]:
        got = f"a layout of {layout.num_tokens} tokens"
        refuse("layout", got, f"T = {size['T']} tokens as in query", "Make it from the lengths of this pack.")
    if scale is None:
        scale = size["D"] ** -0.5
    check_number("scale", scale, "Leave the default, D**-0.5.")
    check_choice("backend", backend, BACKENDS, "Leave the default, 'auto'.")
    backend = resolve_backend(backend, query)
    if backend == "reference":
        return prefix_attention_reference(query, key, value, layout, scale)
    query, key, value = map(_with_adjacent_elements, (query, key, value))
    return _PrefixAttention.apply(query, key, value, layout.plan(query.device), LEAVES[backend], float(scale))
