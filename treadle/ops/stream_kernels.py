"""A router's decision, its reading of several residual streams and the write back, as two compiled functions (csrc/streams.c).

The reference is layers/streams.py `Router.route` with ops/streams.py; both agree to rounding. X [N, n, D] is read once in each
direction where torch's operations pass over it some thirty times, and the product H X is not made before it is written: `held`
below stands for H X, but has X's numbers in it. Only `write_streams` may take it, and the gradient it gets is that of H X.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from treadle.ops.first_order import first_order
from treadle.ops.kernel_inputs import address, kernels, usable
from treadle.ops.native import library

Kind = Literal["lie", "mixture", "sinkhorn"]
KINDS: dict[Kind, int] = {"lie": 0, "mixture": 1, "sinkhorn": 2}
TILE, STREAMS, OUTPUTS = 16, 8, 160  # tokens side by side, and the most streams and outputs that csrc/streams.c has room for


class _Router(ctypes.Structure):
    """struct router of csrc/streams.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("streams", "width", "components", "outputs", "entries", "kind", "mean")),
        ("eps", ctypes.c_double), *((name, ctypes.c_void_p) for name in ("weight", "bias", "gain", "table")),
    )  # fmt: skip


class _Kept(ctypes.Structure):
    """struct kept of csrc/streams.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("z", "scale", "pre", "shares"))


class Read(NamedTuple):
    """What `read_streams` gives: u [N, D]; held (H X, not yet made) [N, n, D]; post [N, n]; mixing H [N, n, n], which has no
    gradient of its own (it is in that of held)."""

    u: Tensor
    held: Tensor
    post: Tensor
    mixing: Tensor


def available(x: Tensor, weight: Tensor, outputs: int) -> bool:
    """Whether the kernels take these streams [..., n, D] and this router."""
    fits = x.shape[-2] <= STREAMS and outputs <= OUTPUTS and x.dtype != torch.float64
    return fits and usable(x, weight) and library("streams") is not None


def _done(code: int) -> None:
    if code:
        raise MemoryError("no memory for the buffers of a stream router")


def _router(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, table: Tensor | None, kind: Kind, eps: float, mean: bool) -> _Router:
    _, n, width = x.shape
    outputs = weight.shape[0]
    entries = table.shape[1] if table is not None else 0
    pointers = map(address, (weight, bias, gain, table))
    return _Router(n, width, outputs - 2 * n, outputs, entries, KINDS[kind], int(mean), eps, *pointers)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, table: Tensor, kind: Kind, eps: float, mean: bool
    ) -> tuple[Tensor, ...]:
        x, weight, bias, gain = x.contiguous(), weight.contiguous(), bias.contiguous(), gain.contiguous()
        table = table.contiguous() if table is not None else None
        (count, n, width), outputs = x.shape, weight.shape[0]
        tiles = -(-count // TILE)
        kept = [weight.new_empty(tiles, numbers, TILE) for numbers in (outputs, 1, n, outputs - 2 * n)]
        u, post, mixing = (weight.new_empty(count, *more) for more in ((width,), (n,), (n, n)))
        router, keep = _router(x, weight, bias, gain, table, kind, eps, mean), _Kept(*map(address, kept))
        _done(kernels(library("streams"), x).streams_read(
            ctypes.byref(router), ctypes.byref(keep), *map(address, (x, u, post, mixing)), ctypes.c_int64(count), torch.get_num_threads(),
        ))  # fmt: skip
        ctx.save_for_backward(x, weight, bias, gain, table, mixing, *kept)
        ctx.how = kind, eps, mean
        ctx.mark_non_differentiable(mixing)
        return u, x.view_as(x), post, mixing

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_u: Tensor, grad_held: Tensor, grad_post: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, weight, bias, gain, table, mixing, *kept = ctx.saved_tensors
        grads = [t.contiguous() for t in (grad_u, grad_held, grad_post)]
        sizes = [weight.numel(), bias.numel(), gain.numel(), 0 if table is None else table.numel()]
        grad_x, sums = torch.empty_like(x), weight.new_empty(sum(sizes))
        router, keep = _router(x, weight, bias, gain, table, *ctx.how), _Kept(*map(address, kept))
        _done(kernels(library("streams"), x).streams_read_gradient(
            ctypes.byref(router), ctypes.byref(keep), address(x), address(mixing), *(address(t) for t in (*grads, grad_x, sums)),
            ctypes.c_int64(x.shape[0]), torch.get_num_threads(),
        ))  # fmt: skip
        of_weight, of_bias, of_gain, of_table = sums.split(sizes)
        grad_table = None if table is None else of_table.view(table.shape)
        return grad_x, of_weight.view(weight.shape), of_bias, of_gain, grad_table, None, None, None


def read_streams(
    x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, table: Tensor | None, kind: Kind, eps: float, mean: bool = False
) -> Read:
    """X [N, n, D], weight [2 n + k, n D] (D for `mean`: the router sees the streams' mean), bias [2 n + k], gain [3]; all fp32.

    z = weight seen / rms(seen) is split in n, n and k; with logits l = gain_i z + bias: pre = sigmoid(l), post = 2 sigmoid(l),
    u = pre . X, and the mixing matrix of the k: `lie` the Cayley transform (n = 4) of softmax(l) @ table [k, 6], `mixture`
    softmax(l) @ table [k, n n], `sinkhorn` 20 steps from exp(l) (k = n n, no table).
    """
    return Read(*_Read.apply(x, weight, bias, gain, table, kind, eps, mean))  # type: ignore[no-untyped-call]


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: Tensor, mixing: Tensor, post: Tensor, y: Tensor) -> Tensor:
        y, post = y.contiguous(), post.contiguous()
        count, n, width = held.shape
        out = torch.empty_like(held)
        _done(kernels(library("streams"), held).streams_write(
            address(held), address(mixing), address(post), address(y), int(y.dtype == torch.bfloat16), address(out),
            *map(ctypes.c_int64, (count, n, width)), torch.get_num_threads(),
        ))  # fmt: skip
        ctx.save_for_backward(post, y)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        post, y = ctx.saved_tensors
        grad = grad.contiguous()
        grad_y, grad_post = torch.empty_like(y), torch.empty_like(post)
        _done(kernels(library("streams"), grad).streams_write_gradient(
            address(grad), address(post), address(y), int(y.dtype == torch.bfloat16), address(grad_y), address(grad_post),
            *map(ctypes.c_int64, grad.shape), torch.get_num_threads(),
        ))  # fmt: skip
        return grad, None, grad_post, grad_y


def write_streams(read: Read, y: Tensor) -> Tensor:
    """H X + post (x) y [N, n, D] for y [N, D] in fp32 or bf16."""
    return _Write.apply(read.held, read.mixing, read.post, y if y.dtype == torch.bfloat16 else y.float())  # type: ignore[no-untyped-call]
