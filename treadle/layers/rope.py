"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout that Llama uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from treadle.ops.rotary import turn, turn_reference


def rotation(
    position_ids: Tensor, width: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """position_ids [B, T] -> cos, sin [B, 1, T, width / 2]; made once a forward pass and shared by the layers."""
    powers = torch.arange(0, width, 2, dtype=dtype, device=position_ids.device) / width
    angles = position_ids[:, None, :, None].to(dtype) * theta**-powers
    return angles.cos(), angles.sin()


# Kinds of `rope_scaling` -> (keys that each needs, keys that it may have), by the names that Hugging Face gives them.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor", "original_max_position_embeddings"),
             ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
}  # fmt: skip


def checked_scaling(table: Mapping[str, Any]) -> dict[str, Any]:
    """A `rope_scaling` table as it is; ValueError names the kind or key that is unknown, missing or no number."""
    kind = table.get("rope_type")
    if kind not in SCALINGS:
        raise ValueError(f"rope_type = {kind!r} is not computed; there is: {', '.join(SCALINGS)}")
    needed, optional = SCALINGS[kind]
    for key in needed:
        if table.get(key) is None:
            raise ValueError(f"rope_type {kind} needs {key}")
    for key, value in table.items():
        if key == "rope_type":
            continue
        if key not in (*needed, *optional):
            raise ValueError(f"{key} = {value!r} belongs to no rope_type {kind}; it takes {', '.join((*needed, *optional))}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e12
        if not (isinstance(value, bool) if key == "truncate" else number):
            raise ValueError(f"{key} = {value!r} is no number above 0" if key != "truncate" else f"truncate = {value!r} is not true or false")
    return dict(table)


def scaled_rotation(
    position_ids: Tensor, width: int, theta: float, scaling: Mapping[str, Any], trained_length: int
) -> tuple[Tensor, Tensor]:
    """`rotation` with frequencies stretched for rows longer than a model was trained on, as transformers computes them:
    linear (arXiv 2306.15595), dynamic (NTK by the length of each row of this pass: beyond `trained_length` the angles of
    earlier positions change with it, so a cache keeps older ones), llama3 (Llama 3.1), yarn (arXiv 2309.00071).
    position_ids [B, T] -> cos, sin [B, 1, T, width / 2], as `rotation`."""
    powers = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
    kind, factor, share = scaling["rope_type"], float(scaling["factor"]), 1.0
    if kind == "dynamic":
        longest = (position_ids.amax(1) + 1).clamp_min(trained_length).float()[:, None, None, None]
        frequency = 1.0 / (theta * (factor * longest / trained_length - (factor - 1)) ** (width / (width - 2))) ** powers
    else:
        frequency = 1.0 / theta**powers
    if kind == "linear":
        frequency = frequency / factor
    elif kind == "llama3":
        frequency = _llama3(frequency, factor, scaling)
    elif kind == "yarn":
        frequency, share = _yarn(frequency, width, theta, factor, scaling)
    angles = position_ids[:, None, :, None].float() * frequency
    return angles.cos() * share, angles.sin() * share


def _llama3(frequency: Tensor, factor: float, scaling: Mapping[str, Any]) -> Tensor:
    """Long waves are slowed by the factor, short ones kept, those between mixed."""
    low, high, length = (float(scaling[k]) for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    wave = 2 * math.pi / frequency
    mix = (length / wave - low) / (high - low)
    slowed = torch.where(wave > length / low, frequency / factor, frequency)
    between = (wave >= length / high) & (wave <= length / low)
    return torch.where(between, (1 - mix) * slowed / factor + mix * slowed, slowed)


def _yarn(frequency: Tensor, width: int, theta: float, factor: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    """(frequencies, what cos and sin are multiplied by)."""

    def magnitude(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    def turns(count: float) -> float:
        """The dimension whose wave turns `count` times within the length of training."""
        return width * math.log(scaling["original_max_position_embeddings"] / (count * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turns(scaling.get("beta_fast", 32)), turns(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    dims = torch.arange(width // 2, dtype=torch.float32, device=frequency.device)
    slowed = ((dims - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    share = scaling.get("attention_factor")
    if share is None and scaling.get("mscale") and scaling.get("mscale_all_dim"):
        share = magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return frequency / factor * slowed + frequency * (1 - slowed), float(magnitude() if share is None else share)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the opposite rotation: nothing of x is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads_inside = x.transpose(1, 2).is_contiguous()
        return turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, sin, True, ctx.heads_inside), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, E] turned by its positions' angles; where they are for fewer dimensions, the last stay as they are."""
    if torch.compiler.is_compiling():  # a compiler fuses the plain form, and cannot follow writes into slices
        return turn_reference(x, cos, sin)
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
