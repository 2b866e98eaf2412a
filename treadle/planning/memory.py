"""How much memory one process needs, by kind, before anything is allocated.

Weights are arithmetic; activations, gradients as they come and the optimiser's state are traced over tensors without contents
(step_trace.py). Here they become one process's share under a way of running in parallel.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from treadle.layers.lora import FrozenLinear
from treadle.models.base import Model
from treadle.planning.step_trace import Shape, StepTrace

FP32 = 4
# What python, torch and its libraries take in one process on a CPU (measured with torch 2.13: .34-.36 GB; with torch 2.11
# built for CUDA, whose libraries are loaded all the same, .71 GB) and a GPU's context.
PROCESS_GB = {"cpu": 0.36 if torch.version.cuda is None else 0.71, "cuda": 0.5}
PROGRAM_GB = 0.6e-3  # of the program that oneDNN writes for a kind of product of bf16 matrices, and keeps (.57 to .66 MB each)
# On a CPU freed memory is kept for speed (ops/memory.py), and small objects settle in the holes that large tensors leave:
# docs/planning.md has the measurements.
KEPT_SHARE = 0.3
KEPT_WITH_ADAPTERS = 0.2  # of what is beside the frozen weights: .17 to .32 in runs of a model of 51M, 4 and 16 rows of 256 tokens


@dataclass(frozen=True)
class Sizes:
    """Parameters: of all, of the largest block, and of what is in no block (the root under fsdp); how many of them are trained,
    and the bytes that all are held in. loaded: bytes of the frozen model that adapters are trained on, while it is read."""

    parameters: int
    largest_block: int
    root: int
    blocks: tuple[int, ...]
    trained: int
    held: int
    loaded: int = 0

    @staticmethod
    def of(model: Model) -> Sizes:
        """The sizes of a model, which may be without memory."""
        blocks = tuple(sum(p.numel() for p in block.parameters()) for block in model.blocks())
        total = model.parameter_count()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        held = sum(t.nbytes for t in model.parameters()) + sum(b.nbytes for m in frozen_layers(model) for b in m.buffers(False))
        return Sizes(total, max(blocks, default=0), total - sum(blocks), blocks, trained, held, FP32 * (total - trained) if model.adapted else 0)


def frozen_layers(model: Model) -> list[FrozenLinear]:
    """Layers that hold their weights in fewer bits beside the scales of these, which are no parameters."""
    return [module for module in model.modules() if isinstance(module, FrozenLinear)]


@dataclass(frozen=True)
class Memory:
    """Gigabytes of one process. total_gb is the peak, and phase where in the step it is; the kinds are each one's own size,
    and not all of them exist at the peak. activations_gb: beyond weights, gradients and state at the peak, without what the
    loss holds (logits_gb) where the peak is there. casts_gb: weights in 16 bits, as autocast keeps them, at the peak."""

    params_gb: float
    grads_gb: float
    optimizer_gb: float
    activations_gb: float
    logits_gb: float
    casts_gb: float
    gathered_gb: float
    saving_gb: float
    process_gb: float
    kept_gb: float
    total_gb: float
    phase: str

    def to_dict(self) -> dict[str, float | str]:
        """As JSON has it."""
        return asdict(self)


def per_process(
    sizes: Sizes, trace: StepTrace, shape: Shape, mode: str, world: int, shard_size: int | None, *,
    shard_optimizer: bool = False, reshard: bool = True, kind: str = "cpu", asynchronous: bool = False, offload: bool = False,
) -> Memory:  # fmt: skip
    """The memory of one of `world` processes. mode: none, ddp, fsdp or deepspeed (ZeRO stage 2: weights whole, gradients and
    state in shards)."""
    weights = float(sizes.held)
    parts = {"fsdp": shard_size or world, "deepspeed": world}.get(mode, 1)
    params = weights if mode == "deepspeed" else weights / parts
    grads, state = trace.gradients / parts, trace.state / parts
    if mode == "ddp" and shard_optimizer:
        state = trace.state / world
    gathered = after = 0.0
    if mode == "fsdp":
        narrow = FP32 if shape.precision == "fp32" else 2
        blocks = 2 * sizes.largest_block if reshard else sizes.parameters - sizes.root
        gathered = FP32 * sizes.root + narrow * blocks  # the block at work and the one fetched ahead
        after = 2 * FP32 * sizes.largest_block  # a block's whole gradient, before and while it is scattered
    # Buckets hold their gradients for good, and so do passes after the first of a step.
    early = mode == "ddp" or shape.accumulation > 1
    shards_files = mode == "fsdp" or (mode == "ddp" and shard_optimizer)
    saved = params * FP32 * sizes.trained / sizes.held if sizes.loaded else params  # of adapters, these alone
    written = max(saved, state)
    saving = (saved + state if asynchronous else 0.0) + (2 * written if shards_files else 0.0)
    if kind == "cuda":
        saving = 0.0  # copies for a checkpoint are in the machine's memory
    kept_all = 0.0 if offload else params + state
    needs = []
    for moment in trace.moments:
        last = moment.part == "optimiser step"
        own = 0.0 if offload else grads if early or last else moment.gradients / parts
        extra = 0.0 if last else gathered + (after if moment.part == "backward" else 0.0)
        casts = 0.0 if mode == "fsdp" else moment.casts  # there weights are gathered in 16 bits: `gathered`
        needs.append((kept_all + moment.activations + own + extra + casts, moment.part, moment.activations, casts))
    if not offload:
        needs.append((kept_all + grads + saving, "saving", 0.0, 0.0))
    peak, phase, activations, casts = max(needs)
    logits = trace.logits if phase == "loss" else 0.0
    process = PROCESS_GB[kind] + (PROGRAM_GB * trace.products if kind == "cpu" else 0.0)
    frozen = params if sizes.loaded else 0.0  # is never freed, so that nothing settles in its place
    kept = (KEPT_WITH_ADAPTERS if sizes.loaded else KEPT_SHARE) * (peak - frozen) / 1e9 if kind == "cpu" and mode != "fsdp" else 0.0
    if sizes.loaded and params + sizes.loaded > peak + kept * 1e9:  # before anything was freed that could be kept
        peak, phase, activations, casts, logits, kept = params + sizes.loaded, "reading the frozen model", 0.0, 0.0, 0.0, 0.0
    return Memory(
        params / 1e9, grads / 1e9, state / 1e9, (activations - logits) / 1e9, trace.logits / 1e9, casts / 1e9, gathered / 1e9,
        saving / 1e9,
        process, kept, peak / 1e9 + process + kept, phase,
    )  # fmt: skip


def to_read(sizes: Sizes, state_bytes: int, activations: float, kind: str, laid_out: int) -> dict[str, float]:
    """Gigabytes to generate with: weights as they are held (fp32), what is laid out of them for decoding (bytes), the decoding state of
    all rows at its fullest, and the pass over the prompt."""
    parts = {"params_gb": FP32 * sizes.parameters / 1e9, "laid_out_gb": laid_out / 1e9, "state_gb": state_bytes / 1e9, "activations_gb": activations / 1e9,
             "process_gb": PROCESS_GB[kind]}  # fmt: skip
    return {**parts, "total_gb": sum(parts.values())}
