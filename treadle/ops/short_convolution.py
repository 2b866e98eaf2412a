"""A short causal convolution of each channel, with the silu that follows it in most mixers: y_t = f(sum_k w_k x_{t-k}) over the
positions of one document. Compiled (csrc/convolution.c), and in operations of torch wherever the kernel does not run."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.first_order import first_order
from treadle.ops.kernel_inputs import address, kernels, usable
from treadle.ops.native import library

LONGEST = 16  # positions that csrc/convolution.c has room for


def short_convolution_reference(x: Tensor, weight: Tensor, doc_ids: Tensor | None = None, silu: bool = False) -> Tensor:
    """The equation as it stands. x [B, T, C], weight [C, size], doc_ids [B, T] -> [B, T, C]."""
    y = x * weight[:, 0]
    for back in range(1, min(weight.shape[1], x.shape[1])):
        earlier = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        if doc_ids is not None:
            same = doc_ids == F.pad(doc_ids, (back, 0), value=-2)[:, : x.shape[1]]
            earlier = earlier * same[..., None]
        y = y + earlier * weight[:, back]
    return F.silu(y) if silu else y


class _ShortConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, doc_ids: Tensor | None, silu: bool) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        doc_ids = doc_ids.to(torch.int64).contiguous() if doc_ids is not None else None
        y = torch.empty_like(x)
        kernels(library("convolution"), x).convolution(
            address(x), address(weight), address(doc_ids), int(silu), address(y), *map(ctypes.c_int64, (*x.shape, weight.shape[1])),
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, doc_ids)
        ctx.silu = silu
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, doc_ids = ctx.saved_tensors
        grad, grad_x, of_weight = grad.contiguous(), torch.empty_like(x), weight.new_empty(x.shape[0], *weight.shape)
        kernels(library("convolution"), x).convolution_gradient(
            *map(address, (x, weight, doc_ids)), int(ctx.silu), *map(address, (grad, grad_x, of_weight)),
            *map(ctypes.c_int64, (*x.shape, weight.shape[1])), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, of_weight.sum(0), None, None


def short_convolution(x: Tensor, weight: Tensor, doc_ids: Tensor | None = None, silu: bool = False) -> Tensor:
    """x [B, T, C], weight [C, size] (its first column is of the present position), doc_ids [B, T] -> [B, T, C]."""
    fits = x.dtype == weight.dtype == torch.float32 and 1 <= weight.shape[1] <= LONGEST
    if fits and usable(x, weight, doc_ids) and library("convolution") is not None:
        return _ShortConvolution.apply(x, weight, doc_ids, silu)  # type: ignore[no-untyped-call]
    return short_convolution_reference(x, weight, doc_ids, silu)
