"""prefix_attention: attention of packed groups that share a prefix, with a dense mask. T packed tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor


class PackLayout:
    """Segments of a pack. Host-side, immutable.

    starts: (S + 1,) CPU int64 offsets. prefix: (S,) CPU int64, the segment whose tokens this one also reads, its own
    number where none.
    """

    def __init__(self, starts: Tensor, prefix: Tensor):
        self.starts, self.prefix = starts, prefix

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    @classmethod
    def from_groups(cls, groups: Sequence[tuple[int, Sequence[int]]]) -> "PackLayout":
        """[prefix | response 1 | ... | response n] per group of (prefix length, response lengths)."""
        lengths, prefix = [], []
        for length, responses in groups:
            first = len(lengths)
            if length:
                lengths.append(length)
                prefix.append(first)
            for each in responses:
                prefix.append(first if length else len(lengths))
                lengths.append(each)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)])
        return cls(starts, torch.tensor(prefix))


def prefix_attention(
    query: Tensor,  # (T, Hq, D)
    key: Tensor,  # (T, Hkv, D)
    value: Tensor,  # (T, Hkv, D)
    *,
    layout: PackLayout,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # (T, Hq, D)
    segment = torch.repeat_interleave(torch.arange(len(layout.prefix)), layout.starts.diff())
    place = torch.arange(len(segment))
    own = (segment[:, None] == segment) & (place[:, None] >= place)
    mask = own | (layout.prefix[segment][:, None] == segment) & (segment[:, None] != segment)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask.to(query.device),
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)
