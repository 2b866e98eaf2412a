"""Whether memory is planned for a GPU: tensors without contents then take the ways that they take there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_GPU_PLANNED: ContextVar[bool] = ContextVar("gpu_planned", default=False)


@contextmanager
def planned_for_gpu() -> Iterator[None]:
    """Inside, tensors on the CPU take the way that they take on a GPU."""
    token = _GPU_PLANNED.set(True)
    try:
        yield
    finally:
        _GPU_PLANNED.reset(token)


def gpu_is_planned() -> bool:
    """Whether memory is being planned for a GPU."""
    return _GPU_PLANNED.get()


def runs_on_cpu(*tensors: Tensor) -> bool:
    """Whether eager functions written for training on a CPU take these: plain tensors and parameters (or what stands for them
    while memory is planned), not those of a compiler, a shard or a quantised weight."""
    if torch.compiler.is_compiling() or _GPU_PLANNED.get():
        return False
    return all(t.device.type == "cpu" and (type(t) in (Tensor, torch.nn.Parameter) or isinstance(t, FakeTensor)) for t in tensors)
