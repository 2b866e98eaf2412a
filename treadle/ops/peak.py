"""What a device can compute at most, where its maker publishes it; never guessed."""

from __future__ import annotations

import functools

import torch

# Dense bf16 tensor-core FLOP/s from the makers' data sheets; the first name found in the device's name counts.
PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Compute capability, from NVIDIA's list (developer.nvidia.com/cuda-gpus).
CAPABILITY = {"H200": (9, 0), "H100 PCIe": (9, 0), "H100": (9, 0), "B200": (10, 0), "A100": (8, 0), "L40S": (8, 9), "L4": (8, 9),
              "RTX 4090": (8, 9), "RTX 3090": (8, 6)}  # fmt: skip


@functools.cache
def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a GPU, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in PEAK_BF16.items() if known in name), None)
