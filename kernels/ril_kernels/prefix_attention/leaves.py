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
    num_tokens, num_heads, _ = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(num_heads, num_tokens, dtype=result_dtype(query.dtype))
    grid = _grid(query, key)
    by_query = [_query_heads(query, grid), _query_heads(out, grid), lse.unflatten(0, grid)]
    by_key = [_key_heads(x, grid) for x in (key, value)]
    for q, o, lse_part, k, v in _by_sequence(sequences, by_query, by_key):
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, sequences.causal, scale=scale
        )
        o.copy_(results[0])
        lse_part.copy_(results[1])
    return out, lse


def cpu_backward(grad_out, query, key, value, out, lse, sequences: Sequences, scale: float):
    check_contract(sequences, (grad_out, query, key, value, out), lse)
    grads = tuple(x.new_empty(x.shape) for x in (query, key, value))
    grid = _grid(query, key)
    by_query = [*(_query_heads(x, grid) for x in (grad_out, query, out, grads[0])), lse.unflatten(0, grid)]
    by_key = [*(_key_heads(x, grid) for x in (key, value)), *(x.transpose(0, 1).unsqueeze(1) for x in grads[1:])]
    for grad_o, q, o, grad_q, lse_part, k, v, grad_k, grad_v in _by_sequence(sequences, by_query, by_key):
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_o, q, k, v, o, lse_part, 0.0, sequences.causal, scale=scale
        )
        grad_q.copy_(results[0])
        torch.sum(results[1], 1, keepdim=True, out=grad_k)
        torch.sum(results[2], 1, keepdim=True, out=grad_v)
    return grads


# On a CPU the key heads are the kernel's batch, and the query heads of one key head its heads, for which a stride of 0
# repeats that key head: a grid of (Hkv, Hq / Hkv). By itself the kernel takes fewer key heads than query heads only
# since pytorch#157893. All of these are views of (tokens, heads, D), of shape (*grid, tokens, D).


def _grid(query: Tensor, key: Tensor) -> tuple[int, int]:
    return key.shape[1], query.shape[1] // key.shape[1]


def _query_heads(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x.unflatten(1, grid).permute(1, 2, 0, 3)


def _key_heads(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x.transpose(0, 1).unsqueeze(1).expand(-1, grid[1], -1, -1)


def _by_sequence(sequences: Sequences, by_query: list[Tensor], by_key: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Each sequence's part of every tensor, whose third dimension is tokens."""
    num_queries, num_keys = (cu.diff().tolist() for cu in (sequences.cu_queries, sequences.cu_keys))
    return zip(*(x.split(num_queries, 2) for x in by_query), *(x.split(num_keys, 2) for x in by_key), strict=True)


LEAVES = {
    "cpu": Leaf(cpu_forward, cpu_backward),
    "torch": Leaf(torch_forward, torch_backward),
    "flash_attn": Leaf(flash_attn_forward, flash_attn_backward),
}
