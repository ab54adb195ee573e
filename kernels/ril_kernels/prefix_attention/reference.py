"""The definition of prefix_attention in plain PyTorch, any dtype. T packed tokens, S segments, D head size."""

import torch
from torch import Tensor

from ril_kernels._checks import result_dtype
from ril_kernels.prefix_attention.layout import PackLayout


def prefix_attention_reference(
    query: Tensor,  # (T, Hq, D)
    key: Tensor,  # (T, Hkv, D), Hq a multiple of Hkv: query head h reads key head h // (Hq / Hkv)
    value: Tensor,  # (T, Hkv, D)
    layout: PackLayout,
    scale: float,
) -> Tensor:  # (T, Hq, D)
    """out[t] = sum_u softmax_u(scale * query[t] . key[u]) value[u], over the tokens u that t reads: those of its own
    segment up to t, and all of its segment's prefix

    Holds the (Hq, T, T) weights. Computes in float32 (float64 for a float64 input), returns the input's dtype.
    """
    segment = torch.arange(len(layout.prefix)).repeat_interleave(layout.starts.diff())  # (T,)
    same = segment[:, None] == segment  # (T, T)
    reads = (same & torch.ones_like(same).tril()) | (~same & (layout.prefix[segment][:, None] == segment))
    dtype, group_size = result_dtype(query.dtype), query.shape[1] // key.shape[1]
    key, value = (x.to(dtype).repeat_interleave(group_size, dim=1) for x in (key, value))
    scores = torch.einsum("thd,uhd->htu", query.to(dtype), key) * scale
    weights = scores.masked_fill(~reads.to(query.device), -torch.inf).softmax(dim=-1)
    return torch.einsum("htu,uhd->thd", weights, value).to(query.dtype)


# name -> groups of (prefix, responses), Hq, Hkv, D, scale of the scores
CASES = {
    "tiny": ([(3, [2, 1]), (0, [1, 2]), (2, [1])], 4, 2, 3, 1.0),
    "ragged": ([(5, [3, 1, 4]), (0, [2, 1]), (4, []), (1, [1, 1]), (7, [6])], 6, 2, 8, 1.0),
    "no_prefix": ([(0, [3, 1, 2])], 2, 2, 5, 1.0),
    "one_token": ([(1, [1, 1]), (0, [1]), (1, [1])], 4, 2, 8, 1.0),
    "prefix_only": ([(6, [])], 2, 1, 4, 1.0),
    "peaked": ([(40, [9, 17, 5]), (33, [20])], 4, 2, 16, 30.0),
    "head_64": ([(70, [33, 20]), (18, [40])], 4, 1, 64, 1.0),
    "head_80": ([(70, [33, 20]), (18, [40])], 4, 4, 80, 1.0),
    "head_96": ([(70, [33, 20]), (18, [40])], 6, 3, 96, 1.0),
    "head_128": ([(70, [33, 20]), (18, [40])], 4, 2, 128, 1.0),
}


def make_inputs(case: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Arguments of prefix_attention for a case of CASES, the same problem in every dtype but for rounding."""
    groups, num_query_heads, num_key_heads, head_size, scale = CASES[case]
    layout = PackLayout.from_groups(groups)
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        name: torch.randn(layout.num_tokens, heads, head_size, generator=generator, dtype=torch.float64)
        for name, heads in (("query", num_query_heads), ("key", num_key_heads), ("value", num_key_heads))
    }
    return {**{name: x.to(dtype) for name, x in inputs.items()}, "layout": layout, "scale": scale * head_size**-0.5}
