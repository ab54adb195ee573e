"""Where tensors and models are: what a model reads goes to the device that holds its weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ril_kernels import copies


def to_device(values, device: torch.device):
    """`values` with every tensor in them, in dicts, lists and tuples, on `device`; the host waits for no copy to a GPU.
    A PackLayout stays as it is: it brings its own tensors where it is used."""
    return tree_map_only(Tensor, partial(copies.to_device, device=device), values)


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`module` on the device, its parameters in the dtype. Buffers keep theirs: the frequencies of rotary embeddings
    are float32 in a model of any dtype."""
    module.to(device)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module
