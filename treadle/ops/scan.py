"""The gated linear recurrence h_t = f_t h_{t-1} + i_t, elementwise over [B, T, D], with its gradient written out:
dh_t = do_t + f_{t+1} dh_{t+1}, di_t = dh_t, df_t = dh_t h_{t-1} (HGRN, arXiv 2311.04823).

Three ways: C through ctypes and a loop of torch operations in place, whose values are equal bit for bit and whose gradients
agree to 2e-6, and flash-linear-attention on CUDA (2e-6).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from treadle.ops.first_order import first_order
from treadle.ops.native import library

Backend = Literal["auto", "native", "loop", "triton"]


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
    def forward(ctx: Any, gate: Tensor, value: Tensor, start: Tensor | None, native: bool, shapes: bool) -> Tensor:
        gate, value = gate.contiguous(), value.contiguous()
        start = start.contiguous() if start is not None else None
        out = torch.empty_like(value)
        if native:
            library("scan").scan_forward(  # type: ignore[union-attr]
                *_pointers(gate, value, start, out), *_sizes(value), torch.get_num_threads()
            )
        elif not shapes:  # tensors without contents (memory is planned): no loop over positions
            state = start if start is not None else torch.zeros_like(value[:, 0])
            for f, i, h in zip(gate.unbind(1), value.unbind(1), out.unbind(1)):
                state = torch.mul(f, state, out=h).add_(i)  # not addcmul, which rounds once: every way has to give the same bits
        ctx.save_for_backward(gate, out, start)
        ctx.native, ctx.shapes = native, shapes
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, out, start = ctx.saved_tensors
        grad = grad.contiguous()
        grad_gate, grad_value = torch.empty_like(gate), torch.empty_like(gate)
        grad_start = torch.empty_like(start) if start is not None else None
        if ctx.native:
            library("scan").scan_backward(  # type: ignore[union-attr]
                *_pointers(gate, start, out, grad, grad_gate, grad_value, grad_start), *_sizes(gate), torch.get_num_threads()
            )
            return grad_gate, grad_value, grad_start, None, None
        if ctx.shapes:
            return grad_gate, grad_value, grad_start, None, None
        carried = torch.zeros_like(grad[:, 0])
        for f, slope, total in reversed(list(zip(gate.unbind(1), grad.unbind(1), grad_value.unbind(1)))):
            torch.add(slope, carried, out=total)
            torch.mul(total, f, out=carried)
        before = torch.cat([(start if start is not None else torch.zeros_like(carried))[:, None], out[:, :-1]], 1)
        torch.mul(grad_value, before, out=grad_gate)
        return grad_gate, grad_value, carried if start is not None else None, None, None


def _pointers(*tensors: Tensor | None) -> list[Any]:
    import ctypes

    return [ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in tensors]


def _sizes(t: Tensor) -> list[Any]:
    import ctypes

    return [ctypes.c_int64(n) for n in t.shape]


@functools.cache
def _flash_linear_attention() -> Any:
    try:
        from fla.ops.hgrn import fused_recurrent_hgrn
    except ImportError:
        return None
    return fused_recurrent_hgrn


def scan(gate: Tensor, value: Tensor, start: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """gate, value [B, T, D], start [B, D] (the state before the first position; default zeros) -> h [B, T, D], in fp32 (fp64 stays)."""
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    gate, value = gate.to(dtype), value.to(dtype)
    start = start.to(dtype) if start is not None else None
    plain = value.device.type == "meta" or type(value) is not Tensor or dtype == torch.float64  # no kernel takes these
    if value.device.type == "cuda" and backend in ("auto", "triton") and not plain and _flash_linear_attention() is not None:
        # It takes the gate's logarithm and adds the input as given.
        return _flash_linear_attention()(value, gate.clamp_min(1e-30).log(), initial_state=start)[0]
    native = value.device.type == "cpu" and backend in ("auto", "native") and not plain and library("scan") is not None
    shapes = value.device.type == "meta" or isinstance(value, FakeTensor)
    return _Scan.apply(gate, value, start, native, shapes)  # type: ignore[no-untyped-call]
