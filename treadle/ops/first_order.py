"""Gradients that are written out as functions of numbers alone, so that they have no derivative of their own.

torch's once_differentiable refuses a second derivative only where the gradient that comes in has one itself. A loss that is
the last function, or that is a plain sum of its output, has none there: with create_graph=True its gradient would look like a
constant, and a penalty on it would silently do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _NoSecond(torch.autograd.Function):
    """The tensors as they are, with an error for a derivative."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("no second derivative: this gradient comes from a kernel whose own derivative is not written out")


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of an autograd.Function whose results cannot be differentiated again; trying is an error."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        several = found if isinstance(found, tuple) else (found,)
        if all(t is None for t in several):
            return found
        marked = iter(_NoSecond.apply(*(t.detach().requires_grad_() for t in several if t is not None)))  # type: ignore[no-untyped-call]
        return tuple(None if t is None else next(marked) for t in several)

    return once
