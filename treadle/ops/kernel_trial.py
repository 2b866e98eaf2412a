"""Kernels that others made are used only after they have agreed with our reference on a small input, in this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def agreed(name: str, reference: str, bound: float, compare: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> bool:
    """Whether every pair (found [...], wanted [...]) of `compare` differs by a share of `bound` at most; where one does not, or anything
    is raised, a warning says that `name` is not used, and why. It may be asked inside a block that recomputes, or where nothing has
    gradients: neither's rules hold for what is tried here."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            for found, wanted in compare():
                error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
                if not error <= bound:
                    raise ArithmeticError(f"it differs from {reference} by {error:.1e}")
    except Exception as problem:  # whatever another package raises, training goes on without it
        warnings.warn(f"{name} is not used: {problem}", stacklevel=3)
        return False
    return True
