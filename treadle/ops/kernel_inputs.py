"""Whether compiled kernels may take these tensors: they read memory at addresses, which only ordinary tensors on a CPU have."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode


def ordinary(*tensors: Tensor | None) -> bool:
    """All are tensors of a CPU with contents, and nobody watches: while a block is compiled, operations are counted or memory
    is planned (a dispatch mode), operations of torch have to be seen."""
    kinds = all(t is None or (type(t) in (Tensor, Parameter) and t.device.type == "cpu") for t in tensors)
    return kinds and not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


def address(t: Tensor | None) -> ctypes.c_void_p:
    """Of the first number of a contiguous tensor; NULL for None."""
    return ctypes.c_void_p(t.data_ptr() if t is not None else None)
