"""The [parallel] section."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from treadle.settings import Settings, option


def _boolean_mode(name: str) -> Callable[[Any], dict[str, Any]]:
    def translate(value: Any) -> dict[str, Any]:
        if not isinstance(value, bool):
            raise ValueError
        return {"parallel.mode": name} if value else {}

    return translate


class ParallelSettings(Settings):
    """How several processes share the work."""

    mode: Literal["auto", "none", "ddp", "fsdp", "deepspeed"] = option("auto", aliases=("strategy",))
    """auto: ddp (every process holds the whole model), or fsdp (weights, gradients and optimiser in shards) where 16
    bytes a parameter would fill more than 60% of a device; deepspeed hands the step to DeepSpeed."""

    world_size: int | None = option(None, ge=1)
    """Number of processes there must be; another number is an error."""

    backend: Literal["auto", "gloo", "nccl"] = option("auto", aliases=("distributed_backend",))
    """What carries tensors between processes: nccl between GPUs, gloo between CPUs."""

    communication_timeout: float = option(600.0, gt=0.0)
    """Seconds after which a process that waits for others gives up."""

    shard_size: int | None = option(None, ge=1)
    """fsdp: processes that share one copy of the weights, the copies being kept equal as under ddp (hybrid sharding);
    without it all processes share one copy."""

    reshard_after_forward: bool = option(True)
    """fsdp: free a block's gathered weights after its forward pass and gather them again for backward; false keeps them,
    for more memory and a third less communication."""

    cpu_offload: bool = option(False)
    """fsdp on a GPU: keep shards, gradients and optimiser state in the machine's memory."""

    shard_optimizer: bool = option(False, aliases=("zero_optimizer",))
    """ddp: each process keeps the optimiser state of a part of the weights (ZeRO stage 1)."""

    bucket_megabytes: float = option(25.0, aliases=("bucket_cap_mb",), gt=0.0)
    """ddp: gradients travel in buckets of this size while backward goes on."""

    static_graph: Literal["auto"] | bool = option("auto")
    """ddp: every step uses the same parameters in the same order; auto says so where each step is one forward pass."""

    deepspeed: str | None = option(None, aliases=("deepspeed_config",))
    """A DeepSpeed JSON file; it gives batch, accumulation, optimiser and precision where nothing else does. Without one,
    mode = deepspeed writes a ZeRO stage 2 file into the run."""

    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {
        "use_ddp": _boolean_mode("ddp"),
        "use_fsdp": _boolean_mode("fsdp"),
        "use_deepspeed": _boolean_mode("deepspeed"),
        "distributed": _boolean_mode("auto"),
    }

    switches: ClassVar[dict[str, tuple[str, ...]]] = {"use_deepspeed": ("deepspeed_config",)}

    @model_validator(mode="after")
    def _consistent(self) -> ParallelSettings:
        if self.deepspeed is not None and self.mode not in ("auto", "deepspeed"):
            raise ValueError(f"deepspeed names a file, but mode = {self.mode}; leave one of the two out")
        return self
