"""Weights, gradients and optimiser state in shards (Zhao et al. 2023, arXiv 2304.11277), by torch's `fully_shard`.

Each block is a unit that is gathered for its forward and backward pass; embedding, last norm and head belong to the
root. Master weights and reductions are fp32. Where products are computed in bf16 the blocks are gathered in bf16, which
halves the traffic; the residual stream, the root and whatever a model lists in `full_precision_modules()` stay fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from treadle.distributed.base import Strategy
from treadle.distributed.settings import ParallelSettings
from treadle.distributed.world import World
from treadle.errors import ConfigError
from treadle.models.base import Model
from treadle.ops.precision import autocast_dtype


def make_mesh(kind: str, size: int, shard_size: int | None) -> DeviceMesh:
    """One dimension of shards, or copies x shards; ConfigError when the sizes do not fit."""
    if shard_size in (None, size):
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    assert shard_size is not None
    if size % shard_size:
        fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ConfigError(f"parallel.shard_size = {shard_size} does not divide {size} processes; it may be {fits}")
    return init_device_mesh(kind, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def shard(module: torch.nn.Module, model: Model, mesh: DeviceMesh, settings: ParallelSettings, precision: str) -> None:
    """Marks the model's blocks and the module around it; the parameters are parts from here on."""
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    half = full
    if precision != "fp32":
        half = MixedPrecisionPolicy(
            param_dtype=autocast_dtype(precision), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    offload = CPUOffloadPolicy() if settings.cpu_offload else OffloadPolicy()

    def apply(module: torch.nn.Module, policy: MixedPrecisionPolicy, reshard: bool) -> None:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy, offload_policy=offload)

    for submodule in model.full_precision_modules():
        apply(submodule, full, settings.reshard_after_forward)
    for block in model.blocks():
        apply(block, half, settings.reshard_after_forward)
    apply(module, full, False)  # backward needs the root first: freeing it would gather it twice


class Sharded(Strategy):
    """`fully_shard` on the blocks and the module."""

    mode = "fsdp"
    shards_weights = shards_optimizer = True

    def __init__(
        self, module: torch.nn.Module, model: Model, world: World, settings: ParallelSettings, precision: str,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(module, world)
        if settings.cpu_offload and device.type == "cpu":
            raise ConfigError("parallel.cpu_offload moves shards from a GPU to the machine's memory; this run is on the "
                              "CPU: leave it out")  # fmt: skip
        mesh = make_mesh(device.type, world.size, settings.shard_size)
        self.shard_group = mesh.get_group("shard")
        self.host_mesh = mesh if device.type == "cpu" else make_mesh("cpu", world.size, settings.shard_size)
        shard(module, model, mesh, settings, precision)
        self.loss_factor = float(world.size)

    def global_norm(self, norm: Tensor) -> Tensor:
        square = norm.square()
        dist.all_reduce(square, group=self.shard_group)
        return square.sqrt()

    def with_full_weights(self, work: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return super().with_full_weights(work, *arguments)
        finally:  # a forward pass without backward leaves what it gathered
            for submodule in self.plain.modules():
                if isinstance(submodule, FSDPModule):
                    submodule.reshard()
