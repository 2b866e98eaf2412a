"""Every process holds the whole model; gradients are averaged in buckets during backward (Li et al. 2020, arXiv
2006.15704)."""

from __future__ import annotations

import contextlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from treadle.distributed.base import Strategy
from treadle.distributed.settings import ParallelSettings
from treadle.distributed.world import World

# Its name from torch 2.13 on; the older one warns there.
_BUFFER_SYNC = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class Replicated(Strategy):
    """DistributedDataParallel around the module."""

    mode = "ddp"

    def __init__(self, module: torch.nn.Module, world: World, settings: ParallelSettings, accumulation: int) -> None:
        super().__init__(module, world)
        device = next(module.parameters()).device
        # A graph that is only run whole can be static; inner micro-batches, which do not communicate, change it.
        static = accumulation == 1 if settings.static_graph == "auto" else settings.static_graph
        unsynced: Any = {_BUFFER_SYNC: False}  # buffers are functions of the configuration
        self.module: DistributedDataParallel = DistributedDataParallel(
            module,
            **unsynced,
            device_ids=[device.index] if device.type == "cuda" else None,
            bucket_cap_mb=settings.bucket_megabytes,
            gradient_as_bucket_view=True,
            static_graph=static,
        )
        self.loss_factor = float(world.size)
        self.shards_optimizer = settings.shard_optimizer

    def no_sync(self, unless: bool) -> AbstractContextManager[Any]:
        """Gradients travel once a step, with the last micro-batch."""
        return contextlib.nullcontext() if unless else self.module.no_sync()
