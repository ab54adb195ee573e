"""prefix_attention's cases, and the two forms that SDPA alone allows: a call per response, or a padded batch per group.

T packed tokens, Hq query heads, Hkv key heads, D head size, P prefix and R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import BASELINE, BOTH, NO_GRAD, Case
from ril_kernels import PackLayout, prefix_attention
from ril_kernels.prefix_attention.reference import prefix_attention_reference

Groups = Sequence[tuple[int, Sequence[int]]]
HEADS = (8, 2, 64)  # Hq, Hkv, D
GROUPS: dict[str, Groups] = {
    "P=256 R=32 x8": [(256, [32] * 8)],
    "P=1024 R=64 x8": [(1024, [64] * 8)],
    "ragged, 4 groups": [(200 + 40 * group, [8 + 7 * (group + i) % 57 for i in range(8)]) for group in range(4)],
    "P=0 R=32 x16": [(0, [32] * 16)],
}
SIZES = (1024, 2048, 4096, 8192, 16_384, 32_768)  # T of the growth case


def _members(layout: PackLayout) -> Iterator[tuple[slice | None, list[slice]]]:
    """Per group the rows of its prefix and of each response; a segment that nothing reads is a response."""
    starts, prefix = layout.starts.tolist(), layout.prefix.tolist()
    rows = [slice(a, b) for a, b in pairwise(starts)]
    readers = {p: [s for s, q in enumerate(prefix) if q == p != s] for p in sorted(set(prefix))}
    for p, members in readers.items():
        yield (rows[p], [rows[s] for s in members]) if members else (None, [rows[p]])


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, **mask) -> Tensor:  # (..., tokens, heads, D)
    heads = (x.transpose(-3, -2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads, scale=scale, enable_gqa=True, **mask).transpose(-3, -2)


def _reads(num_prefix: int, num_response: int, device: torch.device) -> Tensor:  # (R, P + R)
    return torch.ones(num_response, num_prefix + num_response, dtype=torch.bool, device=device).tril(num_prefix)


def by_response(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float) -> Tensor:
    """One SDPA call per segment; a response's reads [prefix, itself] under a small mask."""
    out = []
    for prefix, responses in _members(layout):
        segments = [prefix, *responses] if prefix else responses
        for rows in segments:
            if prefix is None or rows is prefix:
                out.append(_sdpa(query[None, rows], key[None, rows], value[None, rows], scale, is_causal=True)[0])
            else:
                both = (torch.cat([x[prefix], x[rows]])[None] for x in (key, value))
                mask = _reads(prefix.stop - prefix.start, rows.stop - rows.start, query.device)
                out.append(_sdpa(query[None, rows], *both, scale, attn_mask=mask)[0])
    return torch.cat(out)


def by_padded_group(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float) -> Tensor:
    """The responses of a group as one padded batch, their prefix's keys and values repeated for each."""
    out = []
    for prefix, responses in _members(layout):
        if prefix is None:
            rows = responses[0]
            out.append(_sdpa(query[None, rows], key[None, rows], value[None, rows], scale, is_causal=True)[0])
            continue
        out.append(_sdpa(query[None, prefix], key[None, prefix], value[None, prefix], scale, is_causal=True)[0])
        lengths = [rows.stop - rows.start for rows in responses]
        padded = [
            torch.nn.utils.rnn.pad_sequence([x[rows] for rows in responses], batch_first=True)
            for x in (query, key, value)
        ]
        both = (
            torch.cat([x[prefix].expand(len(responses), -1, -1, -1), own], dim=1)
            for x, own in zip((key, value), padded[1:], strict=True)
        )
        mask = _reads(prefix.stop - prefix.start, max(lengths), query.device)
        batch = _sdpa(padded[0], *both, scale, attn_mask=mask)
        out += [batch[i, :length] for i, length in enumerate(lengths)]
    return torch.cat(out)


def _gemms(inputs: dict, training: bool) -> Callable[[], object]:
    """The bare products of all that is read, in buffers that exist: 2, with the gradients 7. Causal squares whole."""
    query, key, value = (inputs[name].transpose(0, 1).contiguous() for name in ("query", "key", "value"))
    query = query.unflatten(0, (len(key), -1))  # (Hkv, Hq / Hkv, T, D)
    work = []
    for prefix, responses in _members(inputs["layout"]):
        pairs = [(rows, rows) for rows in ([prefix, *responses] if prefix else responses)]
        if prefix:
            pairs.append((slice(responses[0].start, responses[-1].stop), prefix))
        for rows, keys in pairs:
            q, k, v = query[:, :, rows].flatten(1, 2), key[:, keys].contiguous(), value[:, keys].contiguous()
            work.append((q, k, v, torch.bmm(q, k.mT), torch.empty_like(q), torch.empty_like(k)))

    def run() -> None:
        for q, k, v, scores, out, grad in work:
            torch.bmm(q, k.mT, out=scores)
            torch.bmm(scores, v, out=out)
            if training:
                torch.bmm(q, k.mT, out=scores)
                torch.bmm(scores.mT, q, out=grad)
                torch.bmm(q, v.mT, out=scores)
                torch.bmm(scores, k, out=out)
                torch.bmm(scores.mT, q, out=grad)

    return run


def _qkv(num_tokens: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    num_query, num_key, head_size = HEADS
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(num_tokens, heads, head_size, generator=generator).to(device, dtype)
        for name, heads in (("query", num_query), ("key", num_key), ("value", num_key))
    }


def prefix_attention_case(name: str, groups: Groups, dtype: torch.dtype, device: str) -> Case:
    layout = PackLayout.from_groups(groups)
    num_query, num_key, head_size = HEADS
    inputs = _qkv(layout.num_tokens, dtype, device) | {"layout": layout, "scale": head_size**-0.5}
    reads = sum(n * (n + 1) // 2 for n in layout.starts.diff().tolist())
    for prefix, responses in _members(layout):
        if prefix:
            reads += (prefix.stop - prefix.start) * sum(rows.stop - rows.start for rows in responses)
    product = 2 * reads * num_query * head_size
    return Case(
        "prefix_attention",
        f"prefix_attention {name} T={layout.num_tokens} Hq={num_query} Hkv={num_key} D={head_size}",
        inputs,
        {
            BASELINE: prefix_attention_reference,
            "ril_kernels": prefix_attention,
            "SDPA per response": by_response,
            "SDPA per padded group": by_padded_group,
        },
        {NO_GRAD: [_gemms(inputs, False)], BOTH: [_gemms(inputs, True)]},
        "2 GEMMs over all that is read; 7 with the gradient",
        {NO_GRAD: 2 * product, BOTH: 7 * product},
        grad=("query", "key", "value"),
    )


def growth_case(sizes: Sequence[int], dtype: torch.dtype, device: str) -> Case:
    """One group, which a candidate packs as often as makes its T; the mean over the copies is the same for all."""
    group = GROUPS["P=256 R=32 x8"]
    each = PackLayout.from_groups(group).num_tokens

    def times(count: int) -> Callable[..., Tensor]:
        layout = PackLayout.from_groups(group * count)

        def candidate(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            copies = (x.repeat(count, 1, 1) for x in (query, key, value))
            return prefix_attention(*copies, layout=layout).unflatten(0, (count, each)).mean(dim=0)

        return candidate

    return Case(
        "prefix_attention",
        f"prefix_attention growth, T={sizes[0]} to {sizes[-1]}",
        _qkv(each, dtype, device),
        {f"T={size}": times(size // each) for size in sizes},
        {},
        "",
        grad=("query", "key", "value"),
        no_grad=False,
        tokens={f"T={size}": size for size in sizes},
        grows=True,
    )


def all_cases(dtype: torch.dtype, device: str, full: bool) -> list[tuple[str, str, Callable[[], Case]]]:
    sizes = SIZES if full or device == "cuda" else SIZES[:4]
    cases = {name: partial(prefix_attention_case, name, groups, dtype, device) for name, groups in GROUPS.items()}
    cases["growth"] = partial(growth_case, sizes, dtype, device)
    return [("prefix_attention", name, build) for name, build in cases.items()]
