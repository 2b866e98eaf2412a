"""How much travels between processes in a step, and what that leaves of more processes.

Volumes are what one process sends (and receives) with ring algorithms: an all-reduce of S bytes over W processes moves
2 (W - 1) / W S, an all-gather or a reduce-scatter (W - 1) / W S (Patarasuk and Yuan 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from treadle.planning.memory import FP32, Sizes
from treadle.planning.step_trace import Shape


@dataclass(frozen=True)
class Traffic:
    """Bytes one process sends in one optimiser step."""

    gather: float = 0.0
    scatter: float = 0.0
    reduce: float = 0.0

    @property
    def total(self) -> float:
        """All bytes."""
        return self.gather + self.scatter + self.reduce


def ring(world: int) -> float:
    """The share of a tensor that a gather or scatter moves."""
    return (world - 1) / world


def per_step(
    sizes: Sizes, shape: Shape, mode: str, world: int, shard_size: int | None = None, *, reshard: bool = True,
    shard_optimizer: bool = False,
) -> Traffic:  # fmt: skip
    """The volume of one step of `shape.accumulation` micro-batches."""
    weights = FP32 * sizes.parameters
    trained = FP32 * sizes.trained  # what has gradients
    if world == 1:
        return Traffic()
    if mode == "fsdp":
        parts = shard_size or world
        narrow = FP32 if shape.precision == "fp32" else 2
        blocks = sizes.parameters - sizes.root
        # Each micro-batch: blocks before forward, again before backward if they were freed, the root once.
        wide = FP32 * sizes.root + narrow * blocks * (2 if reshard else 1)
        gather = shape.accumulation * ring(parts) * wide
        scatter = shape.accumulation * ring(parts) * trained
        copies = world // parts
        reduce = shape.accumulation * 2 * ring(copies) * trained / parts
        return Traffic(gather, scatter, reduce)
    if mode == "deepspeed":  # stage 2: gradients to their owners, updated weights to all
        return Traffic(gather=ring(world) * weights, scatter=shape.accumulation * ring(world) * weights)
    gather = ring(world) * trained if shard_optimizer else 0.0
    return Traffic(gather=gather, reduce=2 * ring(world) * trained)


@dataclass(frozen=True)
class Scaling:
    """One row of the curve."""

    world: int
    step_seconds: float
    tokens_per_second: float
    efficiency: float


def curve(
    worlds: list[int], rows_flops: float, tokens: int, volume: dict[int, float], flops_a_second: float,
    bytes_a_second: float, overlap: float,
) -> list[Scaling]:  # fmt: skip
    """Estimated throughput for fixed work a process (weak scaling).

    rows_flops: forward and backward of one process's rows in a step; tokens: how many those rows have; volume: bytes it sends, by
    number of processes; overlap: the share of computing that communication can hide behind.
    """
    compute = rows_flops / flops_a_second
    found, alone = [], tokens / compute
    for world in worlds:
        exposed = max(0.0, volume[world] / bytes_a_second - overlap * compute)
        seconds = compute + exposed
        rate = world * tokens / seconds
        found.append(Scaling(world, seconds, rate, rate / (world * alone)))
    return found
