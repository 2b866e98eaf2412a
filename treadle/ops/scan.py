"""The gated linear recurrence h_t = f_t h_{t-1} + i_t, elementwise over [B, T, D], with its gradient written out:
dh_t = do_t + f_{t+1} dh_{t+1}, di_t = dh_t, df_t = dh_t h_{t-1} (HGRN, arXiv 2311.04823).

Three ways: C through ctypes and a loop of torch operations in place, whose values are equal bit for bit and whose gradients
agree to 2e-6, and a Triton kernel on CUDA (scan_triton.py, 2e-6).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from treadle.ops.cross_entropy_triton import triton_is_installed
from treadle.ops.first_order import first_order
from treadle.ops.kernel_inputs import address
from treadle.ops.native import library
from treadle.ops.planned import is_planned
from treadle.ops.scan_triton import scan_backward, scan_forward

Backend = Literal["auto", "native", "loop", "triton"]
_Way = Literal["native", "loop", "triton", "shapes"]  # shapes: tensors without contents (memory is planned), no loop over positions


def scan_reference(gate: Tensor, value: Tensor, start: Tensor | None = None) -> Tensor:
    """One position after the other, differentiated by autograd. gate, value [B, T, D], start [B, D] -> [B, T, D]."""
    state = start if start is not None else torch.zeros_like(value[:, 0])
    out = []
    for t in range(value.shape[1]):
        state = gate[:, t] * state + value[:, t]
        out.append(state)
    return torch.stack(out, 1)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, start: Tensor | None, way: _Way) -> Tensor:
        gate, value = gate.contiguous(), value.contiguous()
        start = start.contiguous() if start is not None else None
        out = scan_forward(gate, value, start) if way == "triton" else torch.empty_like(value)
        if way == "native":
            library("scan").scan_forward(  # type: ignore[union-attr]
                *map(address, (gate, value, start, out)), *_sizes(value), torch.get_num_threads()
            )
        elif way == "loop":
            state = start if start is not None else torch.zeros_like(value[:, 0])
            for f, i, h in zip(gate.unbind(1), value.unbind(1), out.unbind(1)):
                state = torch.mul(f, state, out=h).add_(i)  # not addcmul, which rounds once: every way has to give the same bits
        ctx.save_for_backward(gate, out, start)
        ctx.way = way
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, out, start = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.way == "triton":
            by_gate, by_value, by_start = scan_backward(gate, start, out, grad)
            return by_gate, by_value, by_start if start is not None else None, None
        grad_gate, grad_value = torch.empty_like(gate), torch.empty_like(gate)
        grad_start = torch.empty_like(start) if start is not None else None
        if ctx.way == "native":
            library("scan").scan_backward(  # type: ignore[union-attr]
                *map(address, (gate, start, out, grad, grad_gate, grad_value, grad_start)), *_sizes(gate), torch.get_num_threads()
            )
            return grad_gate, grad_value, grad_start, None
        if ctx.way == "shapes":
            return grad_gate, grad_value, grad_start, None
        carried = torch.zeros_like(grad[:, 0])
        for f, slope, total in reversed(list(zip(gate.unbind(1), grad.unbind(1), grad_value.unbind(1)))):
            torch.add(slope, carried, out=total)
            torch.mul(total, f, out=carried)
        before = torch.cat([(start if start is not None else torch.zeros_like(carried))[:, None], out[:, :-1]], 1)
        torch.mul(grad_value, before, out=grad_gate)
        return grad_gate, grad_value, carried if start is not None else None, None


def _sizes(t: Tensor) -> list[Any]:
    import ctypes

    return [ctypes.c_int64(n) for n in t.shape]


def scan(gate: Tensor, value: Tensor, start: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """gate, value [B, T, D], start [B, D] (the state before the first position; default zeros) -> h [B, T, D], in fp32 (fp64 stays)."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    gate, value = gate.to(dtype), value.to(dtype)
    start = start.to(dtype) if start is not None else None
    way = _way(value, backend)
    return _Scan.apply(gate, value, start, way)  # type: ignore[no-untyped-call]


def _way(value: Tensor, backend: Backend) -> _Way:
    if value.device.type == "meta" or is_planned(value):
        return "shapes"
    if type(value) is not Tensor or value.dtype == torch.float64:  # no kernel takes these
        return "loop"
    if value.device.type == "cuda" and backend in ("auto", "triton") and triton_is_installed():
        return "triton"
    return "native" if value.device.type == "cpu" and backend in ("auto", "native") and library("scan") is not None else "loop"
