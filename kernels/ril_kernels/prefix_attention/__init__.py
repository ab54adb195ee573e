"""Attention of packed groups whose responses share a prefix."""

from ril_kernels.prefix_attention.layout import PackLayout
from ril_kernels.prefix_attention.op import prefix_attention

__all__ = ["PackLayout", "prefix_attention"]
