"""Whether compiled kernels may take these tensors: they read memory at addresses, which only ordinary tensors on a CPU have."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from treadle.ops.native import library
from treadle.ops.planned import is_planned, runs_on_cpu


def ordinary(*tensors: Tensor | None) -> bool:
    """All are tensors of a CPU with contents, and nobody watches: while a block is compiled or operations are
    counted (a dispatch mode), operations of torch have to be seen."""
    kinds = all(t is None or (type(t) in (Tensor, Parameter) and t.device.type == "cpu") for t in tensors)
    return kinds and not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


def usable(*tensors: Tensor | None) -> bool:
    """All are ordinary, or stand for tensors of a CPU while memory is planned: there a function keeps and makes what it does with
    numbers, and calls no kernel (`kernels`)."""
    some = [t for t in tensors if t is not None]
    return ordinary(*some) or (any(map(is_planned, some)) and runs_on_cpu(*some))


def fit(name: str, *tensors: Tensor | None) -> bool:
    """Whether the kernels of csrc/NAME.c, which take fp32 alone, take these. Of any shapes."""
    return usable(*tensors) and all(t is None or t.dtype == torch.float32 for t in tensors) and library(name) is not None


class _NoKernels:
    """Every function of a library, doing nothing."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: 0


def kernels(made: Any, t: Tensor) -> Any:
    """A compiled library, or one that does nothing where the tensor has no contents. t of any shape."""
    return _NoKernels() if isinstance(t, FakeTensor) else made


def address(t: Tensor | None) -> ctypes.c_void_p:
    """Of the first number of a contiguous tensor; NULL for None and for a tensor without contents. t of any shape."""
    return ctypes.c_void_p(None if t is None or isinstance(t, FakeTensor) else t.data_ptr())
