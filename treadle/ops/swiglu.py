"""down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202, eq. 6) with all its gradients in one function.

Kept for backward: x and the two products; the activations (half as much again) are computed once more there, in the pass over
memory that makes their gradients. s = sigmoid(g), silu'(g) = s (1 + g (1 - s)).
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


def swiglu_reference(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x [..., D]; gate, up [I, D]; down [D, I] -> [..., D]."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, of dense tensors of one type. Both [..., D]."""
    native = kernels(gate, up)
    if native is None:
        return F.silu(gate) * up
    out = torch.empty_like(gate)
    native.swiglu_forward(address(gate), address(up), address(out), KINDS[gate.dtype], gate.numel(), threads_for(gate.numel()))
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up, and silu(gate) up once more, written over `grad` where the kernel runs. All [...,
    D]."""
    native = kernels(grad, gate, up)
    if native is None:
        active = F.silu(gate)
        return torch.ops.aten.silu_backward(grad * up, gate), grad * active, active * up
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    native.swiglu_backward(
        address(grad), address(gate), address(up), address(of_gate), address(of_up), address(grad), KINDS[gate.dtype],
        gate.numel(), threads_for(gate.numel()),
    )  # fmt: skip
    return of_gate, of_up, grad


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        ctx.types, ctx.input_shape = [t.dtype for t in (x, gate, up, down)], x.shape
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        narrow = [w.to(dtype) for w in (gate, up, down)]
        with without_autocast(x):
            g, u = product(flat, narrow[0]), product(flat, narrow[1])
            ctx.save_for_backward(flat, g, u, *narrow)
            return product(gated(g, u), narrow[2]).view(*x.shape[:-1], down.shape[0])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, g, u, gate, up, down = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        of_x, of_gate, of_up, of_down = ctx.needs_input_grad
        slope_gate, slope_up, active = gated_backward(product(grad, down.t()), g, u)
        grad_down = grad.t() @ active if of_down else None
        del active
        grad_x, grads = linears_backward(flat, [gate, up], [slope_gate, slope_up], (of_x, of_gate, of_up))
        if grad_x is not None:
            grad_x = grad_x.view(ctx.input_shape).to(ctx.types[0])
        return grad_x, *(t if t is None else t.to(kind) for t, kind in zip((*grads, grad_down), ctx.types[1:]))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        own = grad.clone(memory_format=torch.contiguous_format)  # written over, and autograd may still need the other
        of_gate, of_up, _ = gated_backward(own, gate, up)
        return of_gate, of_up


def gated_products(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up of two products that are there already, with less kept and read for the gradients than one by one.
    Both [..., D]."""
    alike = gate.dtype == up.dtype and gate.is_contiguous() and up.is_contiguous()
    if not alike or is_short(gate) or not runs_on_cpu(gate, up):
        return F.silu(gate) * up
    return _Gated.apply(gate, up)  # type: ignore[no-untyped-call]


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x [..., D]; gate, up [I, D]; down [D, I] -> [..., D], in autocast's type where that is on."""
    if is_short(x) or not runs_on_cpu(x, gate, up, down):
        return swiglu_reference(x, gate, up, down)
    return _SwiGLU.apply(x, gate, up, down)  # type: ignore[no-untyped-call]
