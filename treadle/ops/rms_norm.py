"""RMS normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4): y = x / sqrt(mean(x^2) + eps) * weight.

On CPU torch's own form runs as several passes that each save their result; one autograd function saves the input and one
number per token. On other devices torch's kernel is used, which autocast runs in fp32 there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.precision import compute_dtype


def rms_norm_same_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The equation as it stands, computed in x's dtype."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The equation as it stands, computed in fp32 and returned in x's dtype."""
    return rms_norm_same_dtype(x.float(), weight, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        x32 = x.float()
        scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x32 * scale).mul_(weight).to(out_dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        grad32 = grad.float()
        normalized = x.float() * scale
        grad_weight = (grad32 * normalized).reshape(-1, x.shape[-1]).sum(0)
        inner = grad32 * weight
        # d(x * s)/dx = s (1 - n n^T / D) with n = x s
        along = (inner * normalized).sum(-1, keepdim=True).div_(x.shape[-1])
        return normalized.mul_(along).sub_(inner).mul_(-scale).to(x.dtype), grad_weight.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., D], weight [D] -> [..., D], in autocast's dtype where that is on (a matrix product reads it next)."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps, compute_dtype(x))  # type: ignore[no-untyped-call]
    # Cast here, or each product that reads it casts, and keeps, a copy of its own: 9% of a bf16 step's memory on an H100.
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps).to(compute_dtype(x))
