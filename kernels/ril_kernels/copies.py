"""Copies to a GPU that the host does not wait for."""

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`. From pinned memory a copy to a GPU waits for nothing; from any other it waits for all that
    was given to the GPU before."""
    if device.type == "cuda" and value.device.type == "cpu" and not torch.compiler.is_compiling():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
