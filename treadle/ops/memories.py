"""Recurrences with a matrix for a memory as compiled functions (csrc/memories.c): those of ops/ssd.py, ops/wkv.py and
ops/delta_rule.py, which hold the equations, the references and the forms in chunks that run wherever the kernels do not.

One position after the other, while the memory stays in the nearest cache; backward keeps the inputs alone. Gradients agree with
the references to 1e-5 of their largest number.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor

from treadle.ops.first_order import first_order
from treadle.ops.kernel_inputs import address, fit, kernels
from treadle.ops.native import library

Kind = Literal["sum", "bonus", "delta"]
KINDS: dict[Kind, int] = {"sum": 0, "bonus": 1, "delta": 2}
_SIZE, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Span(ctypes.Structure):
    """struct span of csrc/memories.c."""

    _fields_ = (("at", _POINTER), ("row", _SIZE), ("head", _SIZE), ("step", _SIZE))


class _Memory(ctypes.Structure):
    """struct memory of csrc/memories.c."""

    _fields_ = (
        *((name, _SIZE) for name in ("rows", "heads", "length", "inner", "width", "kind", "channels", "slopes")),
        *((name, _Span) for name in ("q", "k", "v", "decay", "beta", "y", "error")),
        *((name, _POINTER) for name in ("bonus", "initial", "starts", "last")),
    )  # fmt: skip


class _Slopes(ctypes.Structure):
    """struct slopes of csrc/memories.c."""

    _fields_ = (
        *((name, _Span) for name in ("y", "q", "k", "v", "decay", "beta")), *((name, _POINTER) for name in ("last", "initial", "bonus"))
    )  # fmt: skip


def available(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: fp32 on a CPU."""
    return fit("memories", *tensors)


def _span(t: Tensor | None) -> _Span:
    """Of [B, H, T, E] or [B, H, T]; a dimension B or H of 1 stands for all."""
    if t is None:
        return _Span(None, 0, 0, 0)
    strides = [0 if size == 1 else stride for size, stride in zip(t.shape[:2], t.stride()[:2])]
    return _Span(address(t), *strides, t.stride(2))


def _aligned(t: Tensor) -> Tensor:
    """With its last dimension contiguous."""
    return t if t.dim() == 3 or t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


def _empty(rows: int, heads: int, length: int, *numbers: int) -> Tensor:
    """[B, H, T, ...], lying as [B, T, H, ...]: what joins heads afterwards copies nothing."""
    return torch.empty(rows, length, heads, *numbers, dtype=torch.float32, device="cpu").transpose(1, 2)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: Kind, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None,
        bonus: Tensor | None, initial: Tensor | None, starts: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        q, k, v, decay = (_aligned(t) for t in (q, k, v, decay))
        (rows, heads, length, width), inner = v.shape, k.shape[-1]
        y, last = _empty(rows, heads, length, width), v.new_empty(rows, heads, inner, width)
        error = _empty(rows, heads, length, width) if kind == "delta" else None
        bonus, initial = (t.contiguous() if t is not None else None for t in (bonus, initial))
        tensors = q, k, v, decay, beta, y, error, bonus, initial, starts, last
        sizes = rows, heads, length, inner, width, KINDS[kind], int(decay.dim() == 4), int(ctx.needs_input_grad[4])
        _run("memory_forward", v, _memory(sizes, tensors))
        ctx.save_for_backward(q, k, v, decay, beta, error, bonus, initial, starts)
        ctx.sizes, ctx.kind = sizes, kind
        return y, last

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, beta, error, bonus, initial, starts = ctx.saved_tensors
        rows, heads, length, inner, width, *_ = ctx.sizes
        grad_y = _aligned(grad_y)
        of_q, of_k, of_v = (_empty(rows, heads, length, numbers) for numbers in (inner, inner, width))
        of_decay = _empty(rows, heads, length, *decay.shape[3:])
        of_beta = v.new_empty(rows, heads, length) if beta is not None else None
        of_initial = v.new_empty(rows, heads, inner, width) if initial is not None else None
        of_bonus = v.new_empty(rows, heads, inner) if bonus is not None else None
        grad_last = grad_last.contiguous() if grad_last is not None else None
        memory = _memory(ctx.sizes, (q, k, v, decay, beta, None, error, bonus, initial, starts, None))
        slopes = _Slopes(*map(_span, (grad_y, of_q, of_k, of_v, of_decay, of_beta)), *map(address, (grad_last, of_initial, of_bonus)))
        _run("memory_backward", v, memory, slopes)
        summed = [grad.sum_to_size(t.shape) for grad, t in ((of_q, q), (of_k, k), (of_v, v))]
        grad_decay = of_decay.sum_to_size(decay.shape) if ctx.needs_input_grad[4] else None
        return None, *summed, grad_decay, of_beta, of_bonus.sum(0) if of_bonus is not None else None, of_initial, None


def _memory(sizes: tuple[int, ...], tensors: tuple[Tensor | None, ...]) -> _Memory:
    return _Memory(*sizes, *map(_span, tensors[:7]), *map(address, tensors[7:]))


def _run(name: str, v: Tensor, *structures: ctypes.Structure) -> None:
    if getattr(kernels(library("memories"), v), name)(*map(ctypes.byref, structures), torch.get_num_threads()):
        raise MemoryError("no memory for the buffers of a recurrence")


def recurrence(
    kind: Kind, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, documents: Tensor | None = None, initial: Tensor | None = None, *,
    beta: Tensor | None = None, bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y [B, H, T, P], last memory [B, H, N, P]) of q, k [B, H, T, N] (B and H may be 1 where all share them), v [B, H, T, P],
    log_decay [B, H, T] (or [B, H, T, N] for `bonus`), beta [B, H, T] (`delta`), bonus [H, N] (`bonus`), documents [B, T] and the
    memory before the first position, `initial` [B, H, N, P]: `sum` is ops.ssd.ssd, `bonus` ops.wkv.wkv, `delta`
    ops.delta_rule.delta_rule. All fp32 on a CPU (see `available`)."""
    starts = None
    if documents is not None:
        starts = torch.zeros(documents.shape, dtype=torch.uint8)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return _Recurrence.apply(kind, q, k, v, log_decay, beta, bonus, initial, starts)  # type: ignore[no-untyped-call]
