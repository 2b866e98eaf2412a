"""RMS normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4): y = x / sqrt(mean(x^2) + eps) * weight, alone or of a
sum whose residual goes on.

On CPU torch's own form runs as several passes that each save their result; here one autograd function saves the input (or the
narrower result) and one number per token, and csrc/fused.c makes one pass each way. On other devices torch's kernel is used,
which autocast runs in fp32 there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from treadle.ops.first_order import first_order
from treadle.ops.fused import KINDS, ROWS_TOGETHER, kernels, threads_for
from treadle.ops.kernel_inputs import address
from treadle.ops.precision import compute_dtype

TINY = 1e-30  # of a weight that can be divided by


def rms_norm_same_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The equation as it stands, computed in x's dtype. x [..., D], weight [D]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The equation as it stands, computed in fp32 and returned in x's dtype. x [..., D], weight [D]."""
    return rms_norm_same_dtype(x.float(), weight, eps).to(x.dtype)


def _forward(x: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(the sum x + added, or x itself; its norm in `dtype`; 1 / rms [..., 1] in fp32)."""
    native = kernels(x, added, weight) if dtype in KINDS and weight.dtype == torch.float32 else None
    if native is None:
        total = x if added is None else x + added
        wide = total.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return total, (wide * scale).mul_(weight).to(dtype), scale
    x, added, weight = x.contiguous(), added.contiguous() if added is not None else None, weight.contiguous()
    total = x if added is None else torch.empty_like(x)
    out = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    native.norm_forward(
        address(x), KINDS[x.dtype], address(added), 0 if added is None else KINDS[added.dtype], address(weight), eps,
        address(total), address(out), KINDS[dtype], address(scale), scale.numel(), x.shape[-1], threads_for(x.numel()),
    )  # fmt: skip
    return total, out, scale


def _remembered(ctx: Any, x: Tensor, out: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Saves x, or where that is wider the result, which the product that reads it saves anyhow: x scale = out / weight. A
    weight of exactly 0 forgets its column."""
    narrower = out.dtype == torch.bfloat16 and x.dtype == torch.float32
    ctx.from_result = narrower and (weight.is_meta or isinstance(weight, FakeTensor) or bool((weight.abs() > TINY).all()))
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(out if ctx.from_result else x, weight, scale)


def _backward(
    ctx: Any, grad: Tensor, kept: Tensor | None = None, copy_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """With n = x scale and i = grad weight: d(x scale) / dx = scale (1 - n n^T / D), so (kept + scale (i - n mean(i n)), the
    same in `copy_dtype`, the weight's gradient)."""
    saved, weight, scale = ctx.saved_tensors
    width = saved.shape[-1]
    native = kernels(grad, saved, weight, kept) if weight.dtype == torch.float32 else None
    if native is None:
        wide = grad.float()
        normalized = saved.float() / weight if ctx.from_result else saved.float() * scale
        grad_weight = (wide * normalized).reshape(-1, width).sum(0)
        inner = wide * weight
        along = (inner * normalized).sum(-1, keepdim=True).div_(width)
        grad_x = normalized.mul_(along).sub_(inner).mul_(-scale).to(ctx.x_dtype)
        if kept is not None:
            grad_x += kept
        return grad_x, None if copy_dtype is None else grad_x.to(copy_dtype), grad_weight.to(weight.dtype)
    grad, weight, kept = grad.contiguous(), weight.contiguous(), kept.to(ctx.x_dtype).contiguous() if kept is not None else None
    inverse = weight.reciprocal() if ctx.from_result else None
    rows = saved.numel() // width
    grad_x, grad_weight = saved.new_empty(saved.shape, dtype=ctx.x_dtype), torch.empty_like(weight)
    parts = weight.new_empty(-(-rows // ROWS_TOGETHER), width)
    narrow = saved.new_empty(saved.shape, dtype=copy_dtype) if copy_dtype not in (None, ctx.x_dtype) else None
    native.norm_backward(
        address(grad), KINDS[grad.dtype], address(saved), KINDS[saved.dtype], address(weight), address(inverse), address(scale),
        address(kept), address(grad_x), KINDS[grad_x.dtype], address(narrow), 0 if narrow is None else KINDS[narrow.dtype], address(parts),
        address(grad_weight), rows, width, threads_for(saved.numel()),
    )  # fmt: skip
    return grad_x, narrow if narrow is not None or copy_dtype is None else grad_x, grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
        x, out, scale = _forward(x, None, weight, eps, out_dtype)
        _remembered(ctx, x, out, weight, scale)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, _, grad_weight = _backward(ctx, grad)
        return grad_x, grad_weight, None, None


class _KeepRMSNorm(torch.autograd.Function):
    """x itself as a second output: the gradients of both uses of a residual stream meet in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, ...]:
        dense, out, scale = _forward(x, None, weight, eps, out_dtype)
        _remembered(ctx, dense, out, weight, scale)
        return x, out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_kept: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, _, grad_weight = _backward(ctx, grad, grad_kept)
        return grad_x, grad_weight, None, None


class _AddRMSNorm(torch.autograd.Function):
    """Two outputs, the sum and its norm; the sum's gradient from both is one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, ...]:
        total, out, scale = _forward(x, added, weight, eps, out_dtype)
        _remembered(ctx, total, out, weight, scale)
        ctx.added_dtype = added.dtype
        return total, out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, narrow, grad_weight = _backward(ctx, grad, grad_total, ctx.added_dtype)
        return grad_x, narrow, grad_weight, None, None


def _ours(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x [..., D], weight [D] -> [..., D], in autocast's dtype where that is on (a matrix product reads it next)."""
    if _ours(x):
        return _RMSNorm.apply(x, weight, eps, compute_dtype(x))  # type: ignore[no-untyped-call]
    # Cast here, or each product that reads it casts, and keeps, a copy of its own: 9% of a bf16 step's memory on an H100.
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps).to(compute_dtype(x))


def keep_rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x, its RMS norm), for a residual stream that goes on beside what reads its norm. x [..., D], weight [D]."""
    if _ours(x):
        return _KeepRMSNorm.apply(x, weight, eps, compute_dtype(x))  # type: ignore[no-untyped-call]
    return x, rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x + added, in x's dtype; its RMS norm, in autocast's dtype where that is on); x, added [..., D], weight [D]."""
    if _ours(x) and x.shape == added.shape and torch.promote_types(x.dtype, added.dtype) == x.dtype:
        return _AddRMSNorm.apply(x, added, weight, eps, compute_dtype(x))  # type: ignore[no-untyped-call]
    total = x + added
    return total, rms_norm(total, weight, eps)
