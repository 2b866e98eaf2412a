"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout that Llama uses."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(
    position_ids: Tensor, width: int, theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """position_ids [B, T] -> cos, sin [B, 1, T, width / 2]; made once a forward pass and shared by the layers."""
    powers = torch.arange(0, width, 2, dtype=dtype, device=position_ids.device) / width
    angles = position_ids[:, None, :, None].to(dtype) * theta**-powers
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the opposite rotation: nothing of x is kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, inverse=True), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """In the angles' type with two products written in place: half the time of the four-product form on CPU."""
    sign = -1.0 if inverse else 1.0
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=cos.dtype, device=x.device)
    half = first.shape[-1]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, E] turned by its positions' angles."""
    if torch.compiler.is_compiling():  # a compiler fuses the plain form, and cannot follow writes into slices
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
