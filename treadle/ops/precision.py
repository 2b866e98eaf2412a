"""Which number format to compute in, and how.

`resolve` is a pure function of the machine's features and the model's width, so that a recipe gives the same format on
equal machines; `probe` only verifies the choice and warns.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from treadle.errors import ConfigError
from treadle.ops.processor import made_by_amd

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8_FROM = (8, 9)  # compute capability: Ada, Hopper and later

# CPU: bf16 autocast over fp32 weights pays where the processor multiplies bf16 itself. Measured on two AVX-512-bf16
# cores: the step is 1.7-1.8x faster at width 384. Below this width conversions cost more than products save.
CPU_BF16_FROM_WIDTH = 128


def cpu_multiplies_bf16() -> bool:
    """Whether this processor's products of bf16 are the faster ones: with AMX, and with AVX-512 BF16 on AMD's (Zen 4: 1.7 times fp32's
    step). Intel's have them beside AMX for what it leaves over: where a virtual machine hides AMX, a step takes 1.4 times fp32's. Others
    emulate bf16, several times slower than fp32."""

    def has(name: str) -> bool:
        check = getattr(torch.cpu, name, None)
        return check is not None and bool(check())

    return has("_is_amx_tile_supported") or (has("_is_avx512_bf16_supported") and made_by_amd())


def resolve(requested: str, device: torch.device, width: int) -> str:
    """fp32, bf16, fp16 or fp8 for a request (auto included) on a device; ConfigError where it cannot run."""
    if requested == "fp8":
        check_fp8(torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0))
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        if requested == "bf16" and not has_bf16:
            raise ConfigError("this GPU has no bf16; use --precision fp16 or fp32")
        return ("bf16" if has_bf16 else "fp16") if requested == "auto" else requested
    if requested != "auto":
        return requested
    return "bf16" if cpu_multiplies_bf16() and width >= CPU_BF16_FROM_WIDTH else "fp32"


def check_fp8(capability: tuple[int, int]) -> None:
    """ConfigError for a device without products of 8-bit floats, by its compute capability ((0, 0): no GPU)."""
    if capability < FP8_FROM:
        what = "this is no GPU" if capability == (0, 0) else f"this GPU's is {capability[0]}.{capability[1]}"
        raise ConfigError(f"fp8 needs a GPU of compute capability 8.9 or more, {what}; use --precision bf16, or fp32")


def probe(width: int, rows: int = 2048) -> float:
    """How many times faster a bf16 product of the model's width is than an fp32 one here (about 20 ms)."""
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
        left @ right
        begun = time.perf_counter()
        for _ in range(3):
            left @ right
        times[dtype] = time.perf_counter() - begun
    return times[torch.float32] / max(times[torch.bfloat16], 1e-9)


def autocast_dtype(precision: str) -> torch.dtype:
    """What is computed in; fp8 is bf16 outside of the linear layers (layers/fp8.py)."""
    return torch.bfloat16 if precision == "fp8" else DTYPES[precision]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context a forward pass runs in; weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=autocast_dtype(precision))


def compute_dtype(like: torch.Tensor) -> torch.dtype:
    """The type that products are computed in here: autocast's where it is on, else the tensor's own. `like` of any
    shape."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def without_autocast(like: torch.Tensor) -> AbstractContextManager[Any]:
    """Turns autocast off where it is on; a context that changes nothing would cost 3 microseconds a layer and byte.
    `like` of any shape: its device is what counts."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def without_kept_casts(like: torch.Tensor) -> AbstractContextManager[Any]:
    """Inside, autocast does not keep its 16-bit copy of each weight until it ends: 2 bytes a parameter. `like` of any
    shape: its device is what counts."""
    kind = like.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)
