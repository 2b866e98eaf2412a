"""csrc/fused.c: what it can be called with, and its functions as functions of tensors.

The kernels take plain fp32 and bf16 tensors of the CPU. Each has its equation in torch operations beside the function that
uses it (rms_norm.py, residual.py, rotary.py, swiglu.py, gelu.py, attention.py, cross_entropy.py), which runs wherever the kernel does not.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from treadle.ops import kernel_inputs
from treadle.ops.native import library
from treadle.ops.planned import gpu_is_planned, is_planned

KINDS = {torch.float32: 0, torch.bfloat16: 1}
ROWS_TOGETHER = 64  # BLOCK of csrc/fused.c
ALONE = 1 << 15  # numbers: up to here one thread is done before others have woken (about 5 microseconds)

_POINTER, _SIZE, _INT, _FLOAT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.c_double
_SIGNATURES = {
    "norm_forward": [_POINTER, _INT, _POINTER, _INT, _POINTER, _DOUBLE, _POINTER, _POINTER, _INT, _POINTER, _SIZE, _SIZE, _INT],
    "norm_backward": [_POINTER, _INT, _POINTER, _INT, *[_POINTER] * 5, _INT, _POINTER, _INT, _POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "rotate": [*[_POINTER] * 4, _INT, _POINTER, _POINTER, _SIZE, _FLOAT, *[_SIZE] * 5, _INT],
    "swiglu_forward": [*[_POINTER] * 3, _INT, _SIZE, _INT],
    "swiglu_backward": [*[_POINTER] * 6, _INT, _SIZE, _INT],
    "gelu_forward": [*[_POINTER] * 2, _INT, _SIZE, _INT],
    "gelu_backward": [*[_POINTER] * 4, _INT, _SIZE, _INT],
    "add": [_POINTER, _INT, _POINTER, _INT, _POINTER, _SIZE, _INT],
    "causal_softmax": [_POINTER, _INT, _FLOAT, *[_SIZE] * 5, _INT],
    "causal_softmax_backward": [_POINTER, _POINTER, _INT, _FLOAT, *[_SIZE] * 5, _INT],
    "cross_entropy": [_POINTER, _INT, _POINTER, _SIZE, _FLOAT, _POINTER, _INT, _SIZE, _SIZE, _INT],
}  # fmt: skip
_CANNOT_FAIL = {"swiglu_forward", "swiglu_backward", "gelu_forward", "gelu_backward", "add"}  # they hold nothing but a stack's buffers
NO_MEMORY = 1  # a flag, enum failure of csrc/fused.c


def _done(code: int) -> int:
    if code & NO_MEMORY:
        raise MemoryError("no memory for the buffers of a kernel")
    return code


@functools.cache
def _made() -> ctypes.CDLL | None:
    made = library("fused")
    if made is not None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(made, name)
            function.argtypes, function.restype = arguments, None if name in _CANNOT_FAIL else _done
    return made


_switched_off = False  # of this process


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, the torch forms run: what the kernels are measured and tested against."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def are_switched_off() -> bool:
    """Whether `switched_off` is in force, under which everything takes torch's own operations."""
    return _switched_off


def kernels(*tensors: Tensor | None) -> Any:
    """The compiled file, where it is there and takes these tensors; while memory is planned for a CPU, functions that do nothing."""
    planned = None
    for t in tensors:
        if t is None:
            continue
        if type(t) not in (Tensor, Parameter):
            if not is_planned(t):
                return None
            planned = t
        if t.device.type != "cpu" or t.dtype not in KINDS:
            return None
    if _switched_off or gpu_is_planned() or (made := _made()) is None:
        return None
    return made if planned is None else kernel_inputs.kernels(made, planned)


def threads_for(numbers: int) -> int:
    """How many threads a pass over so many numbers is worth."""
    return 1 if numbers <= ALONE else torch.get_num_threads()
