"""x + added where a residual stream is wider than what is added to it: torch widens into a tensor of its own first, and its
gradient is copied likewise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treadle.ops.fused import KINDS, kernels, threads_for
from treadle.ops.kernel_inputs import address


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor) -> Tensor:
        ctx.added_dtype = added.dtype
        native = kernels(x, added)
        if native is None:
            return x + added
        x, added = x.contiguous(), added.contiguous()
        out = torch.empty_like(x)
        native.add(address(x), KINDS[x.dtype], address(added), KINDS[added.dtype], address(out), x.numel(), threads_for(x.numel()))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, grad.to(ctx.added_dtype)


def residual_sum(x: Tensor, added: Tensor) -> Tensor:
    """x + added of one shape, in x's type where that is the wider. Of any shape."""
    mixed = x.dtype == torch.float32 and added.dtype == torch.bfloat16 and x.shape == added.shape
    if mixed and x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _Sum.apply(x, added)  # type: ignore[no-untyped-call]
    return x + added
