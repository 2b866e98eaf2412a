"""Gradients that are written out as functions of numbers alone, so that they have no derivative of their own.

torch's once_differentiable refuses a second derivative only where the gradient that comes in has one itself, and only for who
asks for every gradient there is: its error hangs on nothing, so torch.autograd.grad(penalty, weights), which leaves out what
does not lead to the weights, never meets it. Here the error hangs on all that the gradient depends on, and such a penalty is
refused too instead of silently doing nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _NoSecond(torch.autograd.Function):
    """Gradients as they are, behind what they depend on; with an error for a derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in tensors[count:])  # no views, which hooks could not write over

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("no second derivative: this gradient comes from a kernel whose own derivative is not written out")


class _Watched:
    """A function's context that remembers the saved tensors: recomputed blocks give them once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @functools.cached_property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor | None, ...] = self._ctx.saved_tensors
        return saved


def _origins(ctx: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Tensors from which all that the function's inputs came from is reached: those `tensors` with a history, and the parameters
    that no history of them leads to. A function that keeps neither an input nor an output has parameters alone."""
    origins = [t for t in tensors if t.requires_grad]
    seen, pending = {t.grad_fn for t in origins}, [ctx]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            origins.append(node.variable)
        pending += [below for below, _ in node.next_functions]
    return origins


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of an autograd.Function whose results cannot be differentiated again; trying is an error (RuntimeError), with
    respect to parameters and to whatever the function kept or its gradient came through."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        watched = _Watched(ctx)
        with torch.no_grad():
            found = backward(watched, *grads)
        several = found if isinstance(found, tuple) else (found,)
        given = [t for t in several if t is not None]
        if not given:
            return found
        origins = _origins(ctx, [t for t in (*grads, *watched.saved_tensors) if t is not None])
        marked = iter(_NoSecond.apply(len(origins), *origins, *(t.detach() for t in given)))  # type: ignore[no-untyped-call]
        return tuple(None if t is None else next(marked) for t in several)

    return once
