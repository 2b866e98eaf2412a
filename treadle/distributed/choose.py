"""From parallel.mode to a strategy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from treadle.distributed.base import Strategy
from treadle.distributed.settings import ParallelSettings
from treadle.distributed.world import World
from treadle.errors import ConfigError
from treadle.models.base import Model
from treadle.ops.memory import machine_bytes

BYTES_A_PARAMETER = 16  # fp32 weight, gradient and AdamW's two moments
FULL = 0.6  # share of a device that these may take before `auto` shards them


def resolve_mode(settings: ParallelSettings, world: World, parameters: int, device: torch.device) -> str:
    """none, ddp, fsdp or deepspeed. ConfigError as `mode_for`."""

    def room() -> float:
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory
        return machine_bytes() // world.local_size

    return mode_for(settings, world.size, parameters, room)


def mode_for(settings: ParallelSettings, processes: int, parameters: int, room: Callable[[], float]) -> str:
    """The same, whoever is started and wherever. room: bytes that one process may take; asked for only where `auto` needs them.
    ConfigError for several processes under mode = none."""
    if settings.deepspeed is not None or settings.mode == "deepspeed":
        return "deepspeed"
    if processes == 1:
        return "none"
    if settings.mode == "none":
        raise ConfigError(f"parallel.mode = none is one process, but there are {processes}; use --parallel ddp or fsdp, or one process")
    if settings.mode != "auto":
        return settings.mode
    return "fsdp" if parameters * BYTES_A_PARAMETER > FULL * room() else "ddp"


def make_strategy(
    mode: str, module: torch.nn.Module, model: Model, world: World, settings: ParallelSettings, *, precision: str,
    accumulation: int, device: torch.device, micro_batch: int = 1, max_grad_norm: float = 0.0,
) -> Strategy:  # fmt: skip
    """The strategy for a resolved mode. Under fsdp the model may still be on the meta device."""
    if mode == "ddp":
        from treadle.distributed.ddp import Replicated

        return Replicated(module, world, settings, accumulation)
    if mode == "fsdp":
        from treadle.distributed.fsdp import Sharded

        return Sharded(module, model, world, settings, precision, device)
    if mode == "deepspeed":
        from treadle.distributed import deepspeed_json
        from treadle.distributed.deepspeed import DeepSpeed

        table = deepspeed_json.read(settings.deepspeed) if settings.deepspeed is not None else None
        whole = deepspeed_json.complete(table, micro=micro_batch, accumulation=accumulation, world=world.size,
                                        precision=precision, max_grad_norm=max_grad_norm)  # fmt: skip
        return DeepSpeed(module, world, whole, device)
    return Strategy(module, world)
