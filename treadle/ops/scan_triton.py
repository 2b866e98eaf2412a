"""The gated linear recurrence on a GPU in one Triton kernel for each direction, gradient included.

A program has some features of one row and walks over the positions in tiles. Inside a tile the recurrence is an associative
scan, as (f, i) followed by (g, j) is (f g, g i + j) (Blelloch 1990, "Prefix sums and their applications"); from tile to tile
the state is carried. Sums associate differently than one position after the other: 2e-6 of the largest value.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

POSITIONS, FEATURES = 32, 32  # of a tile: 4 KiB of each tensor, so that its loads hide their latency


@functools.cache
def _kernels() -> tuple[Any, Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def after(f, i, g, j):
        return f * g, g * i + j

    @triton.jit
    def forward(gate, value, start, out, length, width, STARTED: tl.constexpr, POSITIONS: tl.constexpr, FEATURES: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        inside = feature < width
        position = tl.arange(0, POSITIONS)
        state = tl.zeros([FEATURES], tl.float32)
        if STARTED:
            state = tl.load(start + row * width + feature, mask=inside, other=0.0)
        for first in range(0, length, POSITIONS):
            t = first + position
            real = (t < length)[:, None] & inside[None, :]
            at = (row * length + t)[:, None] * width + feature[None, :]
            f = tl.load(gate + at, mask=real, other=1.0)
            i = tl.load(value + at, mask=real, other=0.0)
            decay, own = tl.associative_scan((f, i), 0, after)
            h = decay * state[None, :] + own
            tl.store(out + at, h, mask=real)
            # Beyond the end gates are 1 and values 0, so that the tile's last row is the last position's in any case.
            state = tl.sum(tl.where((position == POSITIONS - 1)[:, None], h, 0.0), 0)

    @triton.jit
    def backward(gate, start, out, grad, grad_gate, grad_value, grad_start, length, width, STARTED: tl.constexpr, POSITIONS: tl.constexpr, FEATURES: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        inside = feature < width
        position = tl.arange(0, POSITIONS)
        carried = tl.zeros([FEATURES], tl.float32)  # the total of the position after the tile
        for first in range(0, length, POSITIONS):
            t = length - 1 - first - position  # from the last position to the first
            real = (t >= 0)[:, None] & inside[None, :]
            at = (row * length + t)[:, None] * width + feature[None, :]
            # The gate of the position after: total_t = grad_t + gate_(t + 1) total_(t + 1).
            f = tl.load(gate + at + width, mask=real & (t < length - 1)[:, None], other=0.0)
            f = tl.where((t < 0)[:, None], 1.0, f)
            slope = tl.load(grad + at, mask=real, other=0.0)
            if STARTED:  # before the first position: its total is what the start receives
                f = tl.where((t == -1)[:, None] & inside[None, :], tl.load(gate + row * length * width + feature, mask=inside, other=0.0)[None, :], f)
            decay, own = tl.associative_scan((f, slope), 0, after)
            total = decay * carried[None, :] + own
            before = tl.load(out + at - width, mask=real & (t > 0)[:, None], other=0.0)
            if STARTED:
                before = tl.where((t == 0)[:, None], tl.load(start + row * width + feature, mask=inside, other=0.0)[None, :], before)
            tl.store(grad_value + at, total, mask=real)
            tl.store(grad_gate + at, total * before, mask=real)
            carried = tl.sum(tl.where((position == POSITIONS - 1)[:, None], total, 0.0), 0)
        if STARTED:
            if length % POSITIONS == 0:  # no position before the first was in a tile
                carried *= tl.load(gate + row * length * width + feature, mask=inside, other=0.0)
            tl.store(grad_start + row * width + feature, carried, mask=inside)

    return forward, backward


def _grid(value: Tensor) -> tuple[int, int]:
    return value.shape[0], -(-value.shape[2] // FEATURES)


@torch.library.custom_op("treadle::gated_scan_forward", mutates_args=())
def scan_forward(gate: Tensor, value: Tensor, start: Tensor | None) -> Tensor:
    """gate, value [B, T, D], start [B, D], all fp32 and contiguous -> h [B, T, D]."""
    out = torch.empty_like(value)
    _kernels()[0][_grid(value)](gate, value, start, out, *value.shape[1:], start is not None, POSITIONS, FEATURES)
    return out


@scan_forward.register_fake
def _(gate: Tensor, value: Tensor, start: Tensor | None) -> Tensor:
    return torch.empty_like(value)


@torch.library.custom_op("treadle::gated_scan_backward", mutates_args=())
def scan_backward(gate: Tensor, start: Tensor | None, out: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by gate and value [B, T, D] and by start [B, D] (an empty tensor without one); out [B, T, D] is what scan_forward
    returned, grad [B, T, D] its gradient."""
    grad_gate, grad_value = torch.empty_like(gate), torch.empty_like(gate)
    grad_start = torch.empty_like(start) if start is not None else gate.new_empty(0)
    _kernels()[1][_grid(gate)](
        gate, start, out, grad, grad_gate, grad_value, grad_start, *gate.shape[1:], start is not None, POSITIONS, FEATURES
    )
    return grad_gate, grad_value, grad_start


@scan_backward.register_fake
def _(gate: Tensor, start: Tensor | None, out: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(start) if start is not None else gate.new_empty(0)
