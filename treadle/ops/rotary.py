"""x turned by its positions' angles, pair (k, k + half) by pair (Su et al. 2021, arXiv 2104.09864): the arithmetic of
layers/rope.py. Computed in the angles' type, returned in x's."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from treadle.ops.fused import KINDS, kernels, threads_for
from treadle.ops.kernel_inputs import address

_Strides = ctypes.c_int64 * 3


def turn_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, E]; cos, sin [B or 1, 1, T, half]; numbers from 2 half on stay as they are."""
    first, second, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest.to(cos.dtype)], dim=-1).to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False, heads_inside: bool = False) -> Tensor:
    """The same, or the opposite rotation. heads_inside: the result lies in memory as [B, T, H, E], as projections do."""
    rows, heads, length, width = x.shape
    half = cos.shape[-1]
    out = torch.empty(rows, length, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2) if heads_inside else torch.empty(
        x.shape, dtype=x.dtype, device=x.device)  # fmt: skip
    native = kernels(x, cos, sin) if cos.dtype == torch.float32 and x.stride(3) == 1 and cos.shape[1] == 1 else None
    if native is None:
        return _turn_in_place(x, cos, sin, -1.0 if inverse else 1.0, out)
    cos, sin = cos.contiguous(), sin.contiguous()
    native.rotate(
        address(x), _Strides(*x.stride()[:3]), address(out), _Strides(*out.stride()[:3]), KINDS[x.dtype], address(cos),
        address(sin), cos.shape[0], -1.0 if inverse else 1.0, rows, heads, length, half, width - 2 * half, threads_for(x.numel()),
    )  # fmt: skip
    return out


def _turn_in_place(x: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor) -> Tensor:
    """With two products written in place: half the time of the four-product form on CPU."""
    half = cos.shape[-1]
    first, second, rest = x.to(cos.dtype).tensor_split((half, 2 * half), -1)
    wide = out if out.dtype == cos.dtype else torch.empty_like(out, dtype=cos.dtype)
    torch.mul(first, cos, out=wide[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=wide[..., half : 2 * half]).addcmul_(first, sin, value=sign)
    wide[..., 2 * half :] = rest
    return out if wide is out else out.copy_(wide)
