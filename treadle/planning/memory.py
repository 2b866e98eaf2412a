"""How much memory one process needs, by kind, before anything is allocated.

Weights, gradients and optimiser state are arithmetic. Activations are traced: one forward and backward pass of the real
model over fake tensors (shapes without contents), by torch's MemTracker, on any laptop for any size.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from treadle.data.batch import Batch
from treadle.models.base import Model, ModelConfig
from treadle.objectives.base import ModelWithObjective, Objective
from treadle.ops.precision import autocast
from treadle.training import resolve

FP32 = 4
# What python, torch and its libraries take in one process on a CPU (measured with torch 2.13: .36 GB; with torch 2.11 built
# for CUDA, whose libraries are loaded all the same, .71 GB) and a GPU's context.
PROCESS_GB = {"cpu": 0.36 if torch.version.cuda is None else 0.71, "cuda": 0.5}
# glibc's holes where freed memory is kept for speed (ops/memory.py): measured .19 of .91 GB and .18 of .99 GB.
KEPT_SHARE = 0.2


@dataclass(frozen=True)
class Shape:
    """What decides the memory of one step."""

    micro_batch: int
    length: int
    accumulation: int
    precision: str
    gradient_checkpointing: bool | int | list[int]


@dataclass(frozen=True)
class Sizes:
    """Parameters: of all, of the largest block, and of what is in no block (the root under fsdp)."""

    parameters: int
    largest_block: int
    root: int
    matrices: int  # in blocks and of two dimensions: what muon steps

    @staticmethod
    def of(model: Model) -> Sizes:
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks()]
        matrices = sum(p.numel() for block in model.blocks() for p in block.parameters() if p.dim() == 2)
        total = model.parameter_count()
        return Sizes(total, max(blocks, default=0), total - sum(blocks), matrices)


@dataclass(frozen=True)
class Memory:
    """Gigabytes of one process by kind; total_gb is the peak, of which phase says where."""

    params_gb: float
    grads_gb: float
    optimizer_gb: float
    activations_gb: float
    gathered_gb: float
    saving_gb: float
    process_gb: float
    kept_gb: float
    total_gb: float
    phase: str

    def to_dict(self) -> dict[str, float | str]:
        return asdict(self)


def trace_activations(cls: type[Model], config: ModelConfig, objective: Objective, shape: Shape, batch: Batch) -> int:
    """Bytes at the peak of forward and backward of one micro-batch beyond weights and their gradients."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # MemTracker remarks on arguments that are no tensors
        model = cls(config)  # type: ignore[call-arg]
        resolve.set_checkpointing(model, shape.gradient_checkpointing)
        module = ModelWithObjective(model, objective)
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(_drop)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            with autocast(shape.precision, torch.device("cpu")):
                parts = module(batch)
            sum(part.total for part in parts.losses.values()).backward()  # type: ignore[union-attr]
        peak = tracker.get_tracker_snapshot("peak")
        weights = sum(p.nbytes for p in model.parameters())
    return sum(kinds["Total"] for kinds in peak.values()) - weights


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def per_process(
    sizes: Sizes, activations: int, shape: Shape, mode: str, world: int, shard_size: int | None, *,
    optimizer: str = "adamw", shard_optimizer: bool = False, reshard: bool = True, kind: str = "cpu",
    asynchronous: bool = False, offload: bool = False,
) -> Memory:  # fmt: skip
    """The memory of one of `world` processes; `activations` as traced."""
    weights = FP32 * sizes.parameters
    moments = 2 * weights - (FP32 * sizes.matrices if optimizer == "muon" else 0)  # muon keeps one for each matrix
    parts = (shard_size or world) if mode in ("fsdp", "deepspeed") else 1
    params = weights if mode == "deepspeed" else weights // parts
    grads, state = weights // parts, moments // parts
    if mode == "ddp" and shard_optimizer:
        state = moments // world
    gathered = after = 0
    if mode == "fsdp":
        narrow = FP32 if shape.precision == "fp32" else 2
        blocks = 2 * sizes.largest_block if reshard else sizes.parameters - sizes.root
        gathered = FP32 * sizes.root + narrow * blocks  # the block at work and the one fetched ahead
        after = 2 * FP32 * sizes.largest_block  # a block's whole gradient, before and while it is scattered
    # Buckets hold their gradients for good; otherwise gradients begin with the first backward pass of a step.
    early = grads if mode == "ddp" or shape.accumulation > 1 else 0
    shards_files = mode == "fsdp" or (mode == "ddp" and shard_optimizer)
    written = max(params, state)
    saving = (params + state if asynchronous else 0) + (2 * written if shards_files else 0)
    if kind == "cuda":
        saving = 0  # copies for a checkpoint are in the machine's memory
    phases = {
        "forward and backward": params + state + early + activations + gathered,
        "optimiser step": params + state + grads + gathered + after,
        "saving": params + state + grads + saving,
    }
    if offload:
        phases = {"forward and backward": activations + gathered + after}
    phase, peak = max(phases.items(), key=lambda item: item[1])
    process = PROCESS_GB[kind]
    kept = KEPT_SHARE * peak / 1e9 if kind == "cpu" and mode != "fsdp" else 0.0
    return Memory(
        params / 1e9, grads / 1e9, state / 1e9, activations / 1e9, gathered / 1e9, saving / 1e9, process, kept,
        peak / 1e9 + process + kept, phase,
    )  # fmt: skip
