"""Peak rates of the GPUs that `ril plan` knows, as published: dense, no sparsity, SXM boards."""

from __future__ import annotations

from dataclasses import dataclass

from ril_engine.errors import UserError


@dataclass(frozen=True)
class GPU:
    bf16_flops_per_s: float  # tensor cores
    float32_flops_per_s: float  # without TF32
    bytes_per_s: float  # of its memory
    link_bytes_per_s: float  # NVLink, one direction
    host_bytes_per_s: float  # PCIe, one direction


GPUS = {
    # NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM (2021)
    "a100": GPU(312e12, 19.5e12, 2.039e12, 300e9, 32e9),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM (its figures with sparsity halved)
    "h100": GPU(989e12, 67e12, 3.35e12, 450e9, 64e9),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM
    "h200": GPU(989e12, 67e12, 4.8e12, 450e9, 64e9),
    # NVIDIA HGX B200 as commonly cited (its data sheet was not at hand); the larger of two where sources differ
    "b200": GPU(2250e12, 80e12, 8e12, 900e9, 64e9),
}


def gpu_named(name: str) -> GPU:
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: not in the table, expected one of {', '.join(GPUS)}; give the nearest one")
    return GPUS[name.lower()]
