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
    cu_queries, cu_keys, max_queries, max_keys, causal, _ = sequences
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_queries, cu_keys, max_queries, max_keys, 0.0, causal, False, scale=scale
    )
    return out, lse


def torch_backward(grad_out, query, key, value, out, lse, sequences: Sequences, scale: float):
    check_contract(sequences, (grad_out, query, key, value, out), lse)
    cu_queries, cu_keys, max_queries, max_keys, causal, _ = sequences
    no_dropout = torch.empty(0, dtype=torch.uint64, device=query.device)  # in the place of its random state
    return torch.ops.aten._flash_attention_backward(
        grad_out, query, key, value, out, lse, cu_queries, cu_keys, max_queries, max_keys,
        0.0, causal, no_dropout, no_dropout, scale=scale,
    )  # fmt: skip


def flash_attn_forward(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float):
    """flash-attn 2.7 and 2.8."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    check_contract(sequences, (query, key, value))
    cu_queries, cu_keys, max_queries, max_keys, causal, _ = sequences
    out, lse, *_ = _flash_attn_varlen_forward(
        query, key, value, cu_queries, cu_keys, max_queries, max_keys,
        dropout_p=0.0, softmax_scale=scale, causal=causal,
    )  # fmt: skip
    return out, lse


def flash_attn_backward(grad_out, query, key, value, out, lse, sequences: Sequences, scale: float):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    check_contract(sequences, (grad_out, query, key, value, out), lse)
    cu_queries, cu_keys, max_queries, max_keys, causal, _ = sequences
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    _flash_attn_varlen_backward(
        grad_out, query, key, value, out, lse, *gradients, cu_queries, cu_keys, max_queries, max_keys,
        dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return gradients


# Since 2.9 (pytorch#157893) the CPU's kernel takes fewer key heads than query heads; for older ones they are repeated.
_TAKES_FEWER_KEY_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def cpu_forward(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float):
    """The kernel under scaled_dot_product_attention on a CPU, once for equally long sequences side by side; float64
    too."""
    check_contract(sequences, (query, key, value))
    num_tokens, num_heads, _ = query.shape
    out = query.new_empty(query.shape)
    lse = query.new_empty(num_heads, num_tokens, dtype=result_dtype(query.dtype))
    for q, o, lse_part, k, v in _runs(sequences, (query, out, lse.T), (key, value)):
        q, k, v = _heads(q), *(_repeated(_heads(x), num_heads) for x in (k, v))
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, sequences.causal, scale=scale
        )
        _heads(o).copy_(results[0])
        _heads(lse_part).copy_(results[1])
    return out, lse


def cpu_backward(grad_out, query, key, value, out, lse, sequences: Sequences, scale: float):
    check_contract(sequences, (grad_out, query, key, value, out), lse)
    grads = tuple(map(torch.empty_like, (query, key, value)))  # with their strides, which what made them reads fastest
    num_heads = query.shape[1]
    by_query, by_key = (grad_out, query, out, lse.T, grads[0]), (key, value, *grads[1:])
    for grad_o, q, o, lse_part, grad_q, k, v, *grad_kv in _runs(sequences, by_query, by_key):
        k, v = (_repeated(_heads(x), num_heads) for x in (k, v))
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(grad_o), _heads(q), k, v, _heads(o), _heads(lse_part), 0.0, sequences.causal, scale=scale
        )
        _heads(grad_q).copy_(results[0])
        for grad, result in zip(map(_heads, grad_kv), results[1:], strict=True):
            grad.copy_(result if result.shape == grad.shape else result.unflatten(1, (grad.shape[1], -1)).sum(2))
    return grads


def _heads(x: Tensor) -> Tensor:
    """(N, tokens, heads, ...) as the kernel takes it: heads before tokens."""
    return x.transpose(1, 2)


def _repeated(x: Tensor, num_heads: int) -> Tensor:
    return x if _TAKES_FEWER_KEY_HEADS else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _runs(sequences: Sequences, by_query: tuple[Tensor, ...], by_key: tuple[Tensor, ...]) -> Iterator[list[Tensor]]:
    """Of every tensor, whose rows are tokens, the part of sequences side by side that are equally long: (N, tokens,
    ...)."""
    first_query = first_key = 0
    for count, num_queries, num_keys in sequences.runs:
        yield [
            *(x[first_query : first_query + count * num_queries].unflatten(0, (count, num_queries)) for x in by_query),
            *(x[first_key : first_key + count * num_keys].unflatten(0, (count, num_keys)) for x in by_key),
        ]
        first_query, first_key = first_query + count * num_queries, first_key + count * num_keys


LEAVES = {
    "cpu": Leaf(cpu_forward, cpu_backward),
    "torch": Leaf(torch_forward, torch_backward),
    "flash_attn": Leaf(flash_attn_forward, flash_attn_backward),
}
