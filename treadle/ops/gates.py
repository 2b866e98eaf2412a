"""Gates around recurrences and products, each forward and backward in one compiled pass (csrc/gates.c), with its equation in
operations of torch beside it, which runs wherever the kernels do not. fp32."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.first_order import first_order
from treadle.ops.kernel_inputs import address, fit, kernels
from treadle.ops.native import library
from treadle.ops.scan import scan

NormKind = Literal["inside", "after", "centred"]
NORM_KINDS: dict[NormKind, int] = {"inside": 0, "after": 1, "centred": 2}


def _fit(*tensors: Tensor | None) -> bool:
    return fit("gates", *tensors)


def _sizes(*sizes: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, sizes))


class _GatedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, bound: Tensor | None, starts: Tensor | None) -> Tensor:
        gate, value = gate.contiguous(), value.contiguous()
        bound = bound.contiguous() if bound is not None else None
        starts = starts.to(torch.uint8).contiguous() if starts is not None else None
        rows, length, width = gate.shape
        out = torch.empty_like(gate)
        kernels(library("gates"), gate).gated_scan(
            address(gate), address(value), *_sizes(width), address(bound), address(starts), address(out), *_sizes(rows, length, width),
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(gate, value, bound, starts, out)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, value, bound, starts, out = ctx.saved_tensors
        rows, length, width = gate.shape
        grad, grad_gate, grad_value = grad.contiguous(), torch.empty_like(gate), torch.empty_like(gate)
        of_bound = gate.new_empty(rows, width) if bound is not None else None
        kernels(library("gates"), grad).gated_scan_gradient(
            address(gate), address(value), *_sizes(width), *map(address, (bound, starts, out, grad, grad_gate, grad_value)), *_sizes(width),
            address(of_bound), *_sizes(rows, length, width), torch.get_num_threads(),
        )  # fmt: skip
        return grad_gate, grad_value, of_bound.sum(0) if of_bound is not None else None, None


def gated_scan_reference(gate: Tensor, value: Tensor, bound: Tensor | None, starts: Tensor | None) -> Tensor:
    """The equation of `gated_scan` as it stands. gate, value [B, T, D] -> [B, T, D]."""
    f = torch.sigmoid(gate)
    if bound is not None:
        f = bound + (1.0 - bound) * f
    i = F.silu(value) * (1.0 - f)
    if starts is not None:
        f = f.masked_fill(starts[..., None], 0.0)
    return scan(f, i)


def gated_scan(gate: Tensor, value: Tensor, bound: Tensor | None = None, starts: Tensor | None = None) -> Tensor:
    """h_t = f_t h_{t-1} + silu(value_t) (1 - f_t), f = bound + (1 - bound) sigmoid(gate) (HGRN, arXiv 2311.04823): gate, value
    [B, T, D], bound [D] in [0, 1], starts bool [B, T] (positions that forget all before them) -> h [B, T, D]."""
    if not _fit(gate, value, bound):
        return gated_scan_reference(gate, value, bound, starts)
    return _GatedScan.apply(gate, value, bound, starts)  # type: ignore[no-untyped-call]


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None, heads: int, eps: float, kind: NormKind
    ) -> Tensor:
        x, gate, weight = x.contiguous(), gate.contiguous(), weight.contiguous()
        bias = bias.contiguous() if bias is not None else None
        width = weight.numel() // heads
        count = x.numel() // width
        kept, out, ctx.sizes = x.new_empty(count, 2), torch.empty_like(x), (NORM_KINDS[kind], count, heads, width)
        kernels(library("gates"), x).gated_norm(
            *map(address, (x, gate, weight, bias)), ctypes.c_double(eps), address(kept), address(out), *_sizes(*ctx.sizes),
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, gate, weight, bias, kept)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, bias, kept = ctx.saved_tensors
        grad = grad.contiguous()  # by a name: an address alone would not keep it
        grads = torch.empty_like(x), torch.empty_like(gate), weight.new_empty(2, *weight.shape)
        if kernels(library("gates"), grad).gated_norm_gradient(
            *map(address, (grad, x, gate, weight, bias, kept, *grads)), *_sizes(*ctx.sizes), torch.get_num_threads()
        ):
            raise MemoryError("no memory for the gradient of a norm's weight")
        of_weight, of_bias = grads[2].unbind()
        return *grads[:2], of_weight, of_bias if bias is not None else None, None, None, None


def gated_norm_reference(
    x: Tensor, gate: Tensor, weight: Tensor, heads: int, eps: float, kind: NormKind = "inside", bias: Tensor | None = None
) -> Tensor:
    """The equations of `gated_norm` as they stand. x, gate [B, T, heads * P] -> the same shape."""
    opened = F.silu(gate)
    parts = (x * opened if kind == "after" else x).unflatten(-1, (heads, -1))
    if kind == "centred":
        parts = F.layer_norm(parts, parts.shape[-1:], eps=eps)
    else:
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    normed = parts.flatten(-2) * weight
    normed = normed if bias is None else normed + bias
    return normed if kind == "after" else normed * opened


def gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, heads: int, eps: float, kind: NormKind = "inside", bias: Tensor | None = None
) -> Tensor:
    """x and gate [..., D], weight and bias [D], norms over each of `heads` parts of D -> [..., D]: `inside` rms_norm(x) weight
    silu(gate), `after` rms_norm(x silu(gate)) weight, `centred` (layer_norm(x) weight + bias) silu(gate)."""
    if not _fit(x, gate, weight, bias) or (bias is not None) != (kind == "centred"):
        return gated_norm_reference(x, gate, weight, heads, eps, kind, bias)
    return _GatedNorm.apply(x, gate, weight, bias, heads, eps, kind)  # type: ignore[no-untyped-call]


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        both = both.contiguous()
        width = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], width)
        kernels(library("gates"), both).gated_product(address(both), address(out), *_sizes(out.numel() // width, width), torch.get_num_threads())
        ctx.save_for_backward(both)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        grad, out, width = grad.contiguous(), torch.empty_like(both), grad.shape[-1]
        kernels(library("gates"), grad).gated_product_gradient(
            address(grad), address(both), address(out), *_sizes(grad.numel() // width, width), torch.get_num_threads()
        )
        return out


def gated_product_reference(both: Tensor) -> Tensor:
    """The equation of `gated_product` as it stands. both [..., 2 D] -> [..., D]."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def gated_product(both: Tensor) -> Tensor:
    """[..., 2 D], gate and up side by side -> silu(gate) up [..., D]."""
    return _GatedProduct.apply(both) if _fit(both) else gated_product_reference(both)  # type: ignore[no-untyped-call]
