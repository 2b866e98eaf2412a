"""Products of 8-bit floats in training (Micikevicius et al. 2022, arXiv 2209.05433): inputs and weights in e4m3, gradients in e5m2,
each tensor with one scale, from its own largest number, so that none overflows and nothing is kept between steps.

Where the device has them the products are cuBLAS's (torch._scaled_mm), which accumulate in fp32; elsewhere the same numbers are
multiplied in fp32, which says what a GPU will compute and is slow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treadle.ops.first_order import first_order
from treadle.ops.planned import gpu_is_planned
from treadle.ops.precision import compute_dtype, without_autocast

INPUT, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # widths and, for a weight's gradient, rows that cuBLAS multiplies
SMALLEST = 1e-12  # of a tensor's largest number, so that zeros have a scale


def quantized(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [...] -> its numbers in `kind`, dense by rows, and their scale, fp32 []: x is about numbers * scale."""
    x = x.contiguous()
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    scale = largest.float().clamp_min(SMALLEST) / torch.finfo(kind).max
    return (x.float() / scale).clamp(-torch.finfo(kind).max, torch.finfo(kind).max).to(kind), scale


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [M, K] and b [N, K], both of 8 bits and dense by rows -> a b^T with their scales [M, N], of this type."""
    if a.device.type != "cpu" or gpu_is_planned():
        return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)
    return ((a.float() * scale_a) @ (b.float() * scale_b).t()).to(dtype)


def gradients(
    grad: Tensor, a: Tensor, w: Tensor, scale_a: Tensor, scale_w: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Of y = a w^T, from the gradient of y [M, N] in any layout, a [M, K] and w [N, K] of 8 bits: of a [M, K] and of w [N, K], in
    grad's type, where wanted."""
    g, scale_g = quantized(grad, GRADIENT)
    of_a = product(g, w.t().contiguous(), scale_g, scale_w, grad.dtype) if wanted[0] else None
    of_w = None
    if wanted[1] and len(a) % MULTIPLE:  # a last batch of odd length
        of_w = grad.t() @ (a.to(grad.dtype) * scale_a.to(grad.dtype))
    elif wanted[1]:
        of_w = product(g.t().contiguous(), a.t().contiguous(), scale_g, scale_a, grad.dtype)
    return of_a, of_w


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.types, ctx.input_shape = (x.dtype, weight.dtype), x.shape
        dtype = compute_dtype(x)
        with without_autocast(x):
            a, scale_a = quantized(x.reshape(-1, x.shape[-1]), INPUT)
            w, scale_w = quantized(weight, INPUT)
            ctx.save_for_backward(a, w, scale_a, scale_w)
            return product(a, w, scale_a, scale_w, dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, w, scale_a, scale_w = ctx.saved_tensors
        of_x, of_weight = gradients(grad.reshape(-1, grad.shape[-1]), a, w, scale_a, scale_w, ctx.needs_input_grad)
        return (None if of_x is None else of_x.view(ctx.input_shape).to(ctx.types[0]),
                None if of_weight is None else of_weight.to(ctx.types[1]))  # fmt: skip


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K], weight [N, K], K and N multiples of 16 -> x W^T [..., N] in autocast's type where that is on; its gradients are
    products of 8-bit floats too."""
    return _Fp8Linear.apply(x, weight)  # type: ignore[no-untyped-call]


def fp8_linears(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, ...]:
    """x [..., K], weights [O_i, K], biases [O_i] or none -> x W_i^T + b_i [..., O_i], views of one product for which x is rounded
    once; the weights share a scale."""
    whole = fp8_linear(x, torch.cat(weights) if len(weights) > 1 else weights[0])
    if biases:
        whole = whole + torch.cat(biases).to(whole.dtype)
    return whole.split([weight.shape[0] for weight in weights], -1)
