"""Tensors that may be one process's part of a larger one (DTensor), behind one set of questions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Looks at the type without importing torch.distributed.tensor, which takes half a second. Of any shape."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This process's part; shares memory with the tensor. Of any shape."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Writes a whole tensor into a target, of which this process may hold a part only. No communication. Both of one
    whole shape, which may be any shape."""
    if not is_sharded(target):
        target.copy_(whole)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    part = distribute_tensor(whole.to(target.device), mesh, placements, src_data_rank=None)
    target.copy_(part)


def host_copy(tensor: Tensor, host_mesh: Any = None) -> Tensor:
    """A copy in the machine's memory that later steps do not change; a part stays a part, on `host_mesh`. Of any shape."""
    mine = local(tensor).detach().to("cpu", copy=True)
    if not is_sharded(tensor):
        return mine
    from torch.distributed.tensor import DTensor

    mesh = tensor.device_mesh if host_mesh is None else host_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(
        mine,
        mesh,
        tensor.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=tensor.shape,
        stride=torch.empty(tensor.shape, device="meta").stride(),
    )
