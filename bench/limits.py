"""How fast this machine multiplies matrices of the task's own shapes, and moves memory: what any utilisation divides by.

All per CPU-second (of one thread, that is): on a shared machine a thread that waits its turn costs no CPU time, so that shares of
the limit stay what they are on a quiet one.
"""

from __future__ import annotations

import time

import torch

from bench.task import Task


def gemm_gflops(task: Task, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """GFLOP per CPU-second over the products of one block's forward pass, weighted as they occur; the best of `seconds`."""
    shapes = [
        (task.width, 3 * task.width),
        (task.width, task.width),
        (task.width, 4 * task.width),
        (4 * task.width, task.width),
    ]
    pairs = [(torch.randn(task.tokens_per_step, k).to(dtype), torch.randn(k, n).to(dtype)) for k, n in shapes]
    flops = sum(2 * task.tokens_per_step * k * n for k, n in shapes)
    for left, right in pairs:
        left @ right
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        begun = time.process_time()
        for left, right in pairs:
            left @ right
        best = max(best, flops / (time.process_time() - begun) / 1e9)
    return best


def copy_gigabytes(seconds: float = 0.3, megabytes: int = 256) -> float:
    """GB read and written per CPU-second by copying an array that no cache holds."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until or not best:
        begun = time.process_time()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.process_time() - begun) / 1e9)
    return best


def limits(task: Task) -> dict[str, float]:
    return {"fp32_gflops": gemm_gflops(task, torch.float32), "bf16_gflops": gemm_gflops(task, torch.bfloat16),
            "copy_gb": copy_gigabytes()}  # fmt: skip


def step_gflop(task: Task, parameters: int) -> float:
    """6 N D plus attention (PaLM, appendix B), in GFLOP a step."""
    attention = 12 * task.layers * task.width * task.length * task.tokens_per_step
    return (6 * parameters * task.tokens_per_step + attention) / 1e9
