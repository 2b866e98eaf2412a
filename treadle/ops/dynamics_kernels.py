"""INL dynamics between the products of their controller as two compiled passes (csrc/dynamics.c); ops/dynamics.py holds the equations,
and the operations of torch that run wherever the kernels do not."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.ops.kernel_inputs import address, kernels, usable
from treadle.ops.native import library

FLOATS = (torch.float32, torch.bfloat16)


class _Dynamics(ctypes.Structure):
    """struct dynamics of csrc/dynamics.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("count", "width")),
        *((name, ctypes.c_float) for name in ("step", "beta_max", "velocity_max", "mu_min", "mu_max")),
        *((name, ctypes.c_int32) for name in ("half_logits", "half_h", "half_v", "half_out")),
        *((name, ctypes.c_void_p) for name in ("logits", "h", "v", "mu")),
    )  # fmt: skip


def available(h: Tensor, v: Tensor, mu: Tensor, *weights: Tensor, products: torch.dtype) -> bool:
    """Whether the compiled passes take h and v [..., D], mu [D] and the controller's weights: their types, their places
    and a compiler."""
    fits = h.dtype in FLOATS and v.dtype in FLOATS and mu.dtype == torch.float32 and products in FLOATS
    return fits and usable(h, v, mu, *weights) and library("dynamics") is not None


def _given(logits: Tensor, h: Tensor, v: Tensor, mu: Tensor, limits: Sequence[float], out: torch.dtype) -> _Dynamics:
    halves = (int(dtype == torch.bfloat16) for dtype in (logits.dtype, h.dtype, v.dtype, out))
    return _Dynamics(*h.shape, *limits, *halves, *map(address, (logits, h, v, mu)))


def _done(code: int) -> None:
    if code:
        raise MemoryError("no memory for the buffers of INL dynamics")


def moved(logits: Tensor, h: Tensor, v: Tensor, mu: Tensor, limits: Sequence[float]) -> tuple[Tensor, Tensor]:
    """logits (a, b, g) [N, 3D], h, v [N, D], mu [D], all contiguous, limits as ops.dynamics.Limits -> (h', v') in the wider of the
    types of h and v."""
    out = torch.promote_types(h.dtype, v.dtype)
    found = h.new_empty(h.shape, dtype=out), h.new_empty(h.shape, dtype=out)
    given = _given(logits, h, v, mu, limits, out)
    _done(kernels(library("dynamics"), h).dynamics_forward(ctypes.byref(given), *map(address, found), torch.get_num_threads()))
    return found


def slopes(
    logits: Tensor, h: Tensor, v: Tensor, mu: Tensor, limits: Sequence[float], grad_h: Tensor, grad_v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of h' and v' (contiguous, in their type) -> of logits in their type, of h and v but for the controller's share
    in fp32, of mu, and the sum of those of logits over tokens [3D] in fp32."""
    of_logits, of_h, of_v = torch.empty_like(logits), *(h.new_empty(h.shape, dtype=torch.float32) for _ in range(2))
    sums, given = h.new_empty(4 * h.shape[1], dtype=torch.float32), _given(logits, h, v, mu, limits, grad_h.dtype)
    _done(kernels(library("dynamics"), h).dynamics_backward(
        ctypes.byref(given), *map(address, (grad_h, grad_v, of_logits, of_h, of_v, sums)), torch.get_num_threads()
    ))  # fmt: skip
    return of_logits, of_h, of_v, sums[: h.shape[1]], sums[h.shape[1] :]
