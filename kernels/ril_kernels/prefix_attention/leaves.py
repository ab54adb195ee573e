"""Attention of sequences of many lengths in one call, with its log-sum-exp and its backward: one signature, three
implementations.

N sequences, Tq and Tk tokens of all of them together, Hq query heads, Hkv key heads (Hq a multiple), D head size.

    forward(query (Tq, Hq, D), key (Tk, Hkv, D), value (Tk, Hkv, D), sequences, scale)
        -> out (Tq, Hq, D), lse (Hq, Tq): log of the sum of exp(scale * query . key), natural, float32 or wider
    backward(grad_out, query, key, value, out, lse, sequences, scale) -> grad_query, grad_key, grad_value

Backward takes out and lse as arguments: from those of a softmax over more keys than these, it gives these keys' share
of that softmax's gradients. The kernels look at neither strides nor dtypes of all they are handed, so
`check_contract` does, in the CPU's form too, which thereby stands for the others in tests.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ril_kernels._checks import result_dtype
from ril_kernels.prefix_attention.layout import Sequences


class Leaf(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def check_contract(sequences: Sequences, rows: tuple[Tensor, ...], lse: Tensor | None = None) -> None:
    assert all(x.stride(-1) == 1 for x in rows), "the elements of a head must be adjacent"
    assert lse is None or lse.is_contiguous()
    assert sequences.cu_queries.dtype == sequences.cu_keys.dtype == torch.int32


def torch_forward(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float):
    """As torch.nn.attention.varlen calls it: FlashAttention 2, or what torch.nn.attention's
    activate_flash_attention_impl has put in its place."""
    check_contract(sequences, (query, key, value))
    cu_queries, cu_keys, max_queries, max_keys, causal = sequences
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_queries, cu_keys, max_queries, max_keys, 0.0, causal, False, scale=scale
    )
    return out, lse


def torch_backward(grad_out, query, key, value, out, lse, sequences: Sequences, scale: float):
    check_contract(sequences, (grad_out, query, key, value, out), lse)
    cu_queries, cu_keys, max_queries, max_keys, causal = sequences
    no_dropout = torch.empty(0, dtype=torch.uint64, device=query.device)  # in the place of its random state
    return torch.ops.aten._flash_attention_backward(
        grad_out, query, key, value, out, lse, cu_queries, cu_keys, max_queries, max_keys,
        0.0, causal, no_dropout, no_dropout, scale=scale,
    )  # fmt: skip


def flash_attn_forward(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float):
    """flash-attn 2.7 and 2.8."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    check_contract(sequences, (query, key, value))
    cu_queries, cu_keys, max_queries, max_keys, causal = sequences
    out, lse, *_ = _flash_attn_varlen_forward(
        query, key, value, cu_queries, cu_keys, max_queries, max_keys,
        dropout_p=0.0, softmax_scale=scale, causal=causal,
    )  # fmt: skip
    return out, lse


def flash_attn_backward(grad_out, query, key, value, out, lse, sequences: Sequences, scale: float):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    check_contract(sequences, (grad_out, query, key, value, out), lse)
    cu_queries, cu_keys, max_queries, max_keys, causal = sequences
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    _flash_attn_varlen_backward(
        grad_out, query, key, value, out, lse, *gradients, cu_queries, cu_keys, max_queries, max_keys,
        dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return gradients


def cpu_forward(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float):
    """The kernel under scaled_dot_product_attention on a CPU, once per sequence; float64 too."""
    check_contract(sequences, (query, key, value))
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=result_dtype(query.dtype))
    for queries, keys in _pairs(sequences):
        heads = _grouped(query[queries], key[keys], value[keys])
        out_heads, lse_heads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads, 0.0, sequences.causal, scale=scale
        )
        out[queries] = _ungrouped(out_heads)
        lse[:, queries] = lse_heads.flatten(0, 1)
    return out, lse


def cpu_backward(grad_out, query, key, value, out, lse, sequences: Sequences, scale: float):
    check_contract(sequences, (grad_out, query, key, value, out), lse)
    gradients = tuple(x.new_empty(x.shape) for x in (query, key, value))
    for queries, keys in _pairs(sequences):
        query_heads, key_heads, value_heads = _grouped(query[queries], key[keys], value[keys])
        shape = query_heads.shape[:2]  # (Hkv, Hq / Hkv)
        grad_heads, out_heads = (x[queries].unflatten(1, shape).permute(1, 2, 0, 3) for x in (grad_out, out))
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_heads, query_heads, key_heads, value_heads, out_heads, lse[:, queries].unflatten(0, shape),
            0.0, sequences.causal, scale=scale,
        )  # fmt: skip
        gradients[0][queries] = _ungrouped(parts[0])
        for gradient, part in zip(gradients[1:], parts[1:], strict=True):
            gradient[keys] = part.sum(1).transpose(0, 1)
    return gradients


def _pairs(sequences: Sequences) -> Iterator[tuple[slice, slice]]:
    """Rows of the queries and of the keys of each sequence."""
    bounds = [list(map(slice, cu[:-1].tolist(), cu[1:].tolist())) for cu in (sequences.cu_queries, sequences.cu_keys)]
    return zip(*bounds, strict=True)


def _grouped(query: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
    """Views (Hkv, Hq / Hkv, tokens, D) of (tokens, heads, D): the key heads are the kernel's batch and the query heads
    of one its heads, for which a stride of 0 repeats that key head. The kernel takes fewer key heads than query heads
    by itself only since pytorch#157893."""
    num_key_heads = keys[0].shape[1]
    query = query.unflatten(1, (num_key_heads, -1)).permute(1, 2, 0, 3)
    return query, *(x.transpose(0, 1).unsqueeze(1).expand(-1, query.shape[1], -1, -1) for x in keys)


def _ungrouped(heads: Tensor) -> Tensor:  # (Hkv, Hq / Hkv, tokens, D) -> (tokens, Hq, D)
    return heads.flatten(0, 1).transpose(0, 1)


LEAVES = {
    "cpu": Leaf(cpu_forward, cpu_backward),
    "torch": Leaf(torch_forward, torch_backward),
    "flash_attn": Leaf(flash_attn_forward, flash_attn_backward),
}
