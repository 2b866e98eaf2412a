"""Whether memory is planned, and for what: only then do tensors without contents take the ways of training there, calling no kernel.
Anybody else's (torch.export's, a test's) take operations of torch, which their tools can follow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_PLANNED: ContextVar[str | None] = ContextVar("planned", default=None)


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Inside, tensors without contents on the CPU take the way that tensors take in training on a `kind`, cpu or cuda."""
    token = _PLANNED.set(kind)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def gpu_is_planned() -> bool:
    """Whether memory is being planned for a GPU."""
    return _PLANNED.get() == "cuda"


def is_planned(t: Tensor) -> bool:
    """Whether t stands for a tensor while memory is planned. Of any shape."""
    return isinstance(t, FakeTensor) and _PLANNED.get() is not None


def runs_on_cpu(*tensors: Tensor) -> bool:
    """Whether eager functions written for training on a CPU take these: plain tensors and parameters (or what stands for them
    while memory is planned), not those of a compiler, a shard or a quantised weight. Of any shapes."""
    if torch.compiler.is_compiling() or gpu_is_planned():
        return False
    return all(t.device.type == "cpu" and (type(t) in (Tensor, torch.nn.Parameter) or is_planned(t)) for t in tensors)
