"""Reading from and writing to several residual streams. Their gradients are written out: the streams are n times the
size of anything else in a block, and what autograd would do (a zero-filled gradient for each slice, a division for the
norm) costs more passes over them than the mathematics. With them a block of 4 streams at D = 512 takes 1.16 times a plain
one forward and backward on one core (1.23 on two); composed of torch's operations 1.21 (1.32). See bench/streams.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treadle.ops.first_order import first_order


class _RMSNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        z = (x @ weight.t()).mul_(scale)
        ctx.save_for_backward(x, weight, scale, z)
        return z

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, z = ctx.saved_tensors
        scaled = grad * scale
        # d scale / d x = -scale^3 x / width, and z already holds one factor of scale.
        pull = (grad * z).sum(-1, keepdim=True) * scale.square() / -x.shape[-1]
        grad_x = torch.addmm(x * pull, scaled, weight) if ctx.needs_input_grad[0] else None
        return grad_x, scaled.t() @ x, None


def rms_norm_linear(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [N, W], weight [O, W] -> (x / rms(x)) @ weight^T [N, O], without a normalised copy of x."""
    return _RMSNormLinear.apply(x, weight, eps)  # type: ignore[no-untyped-call]


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pre: Tensor, mixing: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, pre, mixing)
        return torch.bmm(pre[:, None], x)[:, 0], torch.bmm(mixing, x)

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor, grad_held: Tensor) -> tuple[Tensor | None, ...]:
        x, pre, mixing = ctx.saved_tensors
        grad_held = grad_held.contiguous()  # an expanded one would be multiplied row by row
        grad_x = torch.bmm(mixing.transpose(1, 2), grad_held)
        grad_x.addcmul_(pre[:, :, None], grad_u[:, None])
        return grad_x, (x * grad_u[:, None]).sum(-1), torch.bmm(grad_held, x.transpose(1, 2))


def read(x: Tensor, pre: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor]:
    """X [N, n, D], pre [N, n], mixing [N, n, n] -> (pre . X [N, D], mixing X [N, n, D])."""
    return _Read.apply(x, pre, mixing)  # type: ignore[no-untyped-call]


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Tensor, post: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(post, y)
        return torch.addcmul(held, post[:, :, None], y[:, None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        post, y = ctx.saved_tensors
        return grad, (grad * y[:, None]).sum(-1), torch.bmm(post[:, None], grad.contiguous())[:, 0]


def write(held: Tensor, post: Tensor, y: Tensor) -> Tensor:
    """held [N, n, D] + post [N, n] (x) y [N, D]."""
    return _Write.apply(held, post, y)  # type: ignore[no-untyped-call]
