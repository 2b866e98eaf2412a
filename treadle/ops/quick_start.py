"""What keeps torch's compiler (torch._dynamo, sympy: 1.3 CPU seconds of imports on a 2021 server core) out of a start that compiles
nothing.

Three things of torch 2.13 load it: operations on the meta device that run through Python decompositions (random fills, empty_like), the
first call of an optimiser's methods that compiled code must not enter, and every step of one. Where torch is built otherwise, the
functions here change nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

FILLS = {torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_, torch.nn.init.constant_,
         torch.Tensor.normal_, torch.Tensor.uniform_}  # fmt: skip
OPTIMIZER_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


class _WithoutFills(TorchFunctionMode):
    """Leaves tensors without values as they are: there is nothing to fill."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FILLS:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **kwargs)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Modules made inside lie on the meta device: shapes and dtypes, no memory and no values."""
    with DeviceContext(torch.device("meta")), _WithoutFills():
        yield


def optimizers_without_compiler() -> None:
    """Lets optimisers be made and stepped without loading torch's compiler. Nothing happens once it is loaded, when its own marks
    on these methods are in place."""
    if "torch._dynamo" in sys.modules:
        return
    for name in OPTIMIZER_METHODS:
        inner = getattr(getattr(torch.optim.Optimizer, name, None), "__wrapped__", None)
        if inner is not None and not hasattr(inner, "__dynamo_disable"):
            setattr(inner, "__dynamo_disable", inner)  # torch's own name


@functools.cache
def stepping_without_compiler(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The optimiser `kind` with a step that runs its own code directly. torch wraps the step in breaks of a compiled graph, which
    load the compiler to do nothing: no step of ours is compiled. State and hooks are those of `kind`."""
    own = inspect.unwrap(kind.step)

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        with torch.no_grad():
            return own(self, closure)

    return type(kind.__name__, (kind,), {"step": step, "__doc__": kind.__doc__, "__module__": __name__})


def empty_on(device: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor of the meta device, of its shape, strides and dtype; `empty_like` of one loads sympy. Sharded tensors
    have a way of their own. Of any shape."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    return torch.empty_like(tensor, device=device)
