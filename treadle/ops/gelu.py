"""down(gelu(up x + b)) + c with GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv 1606.08415), GPT-2's MLP, with all its
gradients in one function.

Kept for backward: x and what goes into the activation. What comes out of it, as much again, is computed once more in the pass over
memory that makes the gradient. Of 4096 x 1536 numbers torch's own form takes 13 + 13 ms in bf16 (17 + 12 in fp32) on one
core with AVX-512, these kernels 4.5 + 6.9 (3.0 + 5.9) with that second computation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.first_order import first_order
from treadle.ops.fused import KINDS, kernels, threads_for
from treadle.ops.kernel_inputs import address
from treadle.ops.linear import is_short, linears_backward, product
from treadle.ops.planned import runs_on_cpu
from treadle.ops.precision import compute_dtype, without_autocast


def gelu_mlp_reference(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None, down_bias: Tensor | None = None) -> Tensor:
    """The equation of `gelu_mlp` as it stands. x [..., D]; up [I, D]; down [D, I]; biases [I], [D] -> [..., D]."""
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form, of a dense tensor [...] without gradients."""
    native = kernels(x)
    if native is None:
        return F.gelu(x, approximate="tanh")
    out = torch.empty_like(x)
    native.gelu_forward(address(x), address(out), KINDS[x.dtype], x.numel(), threads_for(x.numel()))
    return out


def gelu_backward(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and gelu(x) once more, written over `grad` where the kernel runs. Dense, of one type, [...]."""
    native = kernels(grad, x)
    if native is None:
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh"), F.gelu(x, approximate="tanh")
    of_x = torch.empty_like(x)
    native.gelu_backward(address(grad), address(x), address(of_x), address(grad), KINDS[x.dtype], x.numel(), threads_for(x.numel()))
    return of_x, grad


class _GELUMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        given = (x, up, down, up_bias, down_bias)
        ctx.types, ctx.input_shape = [None if t is None else t.dtype for t in given], x.shape
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        wide, narrow, b, c = (None if t is None else t.to(dtype) for t in given[1:])
        assert wide is not None and narrow is not None
        with without_autocast(x):
            h = product(flat, wide, bias=b)
            ctx.save_for_backward(flat, h, wide, narrow)
            return product(gelu(h), narrow, bias=c).view(*x.shape[:-1], down.shape[0])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, h, up, down = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        of_x, of_up, of_down, of_up_bias, of_down_bias = ctx.needs_input_grad
        slope, active = gelu_backward(product(grad, down.t()), h)
        grad_down = grad.t() @ active if of_down else None
        del active
        grad_x, (grad_up,) = linears_backward(flat, [up], [slope], (of_x, of_up))
        grads = (grad_x if grad_x is None else grad_x.view(ctx.input_shape), grad_up, grad_down, slope.sum(0) if of_up_bias else None,
                 grad.sum(0) if of_down_bias else None)  # fmt: skip
        return tuple(t if t is None else t.to(kind) for t, kind in zip(grads, ctx.types))


def gelu_mlp(x: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None, down_bias: Tensor | None = None) -> Tensor:
    """x [..., D]; up [I, D]; down [D, I]; biases [I] and [D] or none -> [..., D], in autocast's type where that is on."""
    given = [t for t in (x, up, down, up_bias, down_bias) if t is not None]
    if is_short(x) or not runs_on_cpu(*given):
        return gelu_mlp_reference(x, up, down, up_bias, down_bias)
    return _GELUMLP.apply(x, up, down, up_bias, down_bias)  # type: ignore[no-untyped-call]
