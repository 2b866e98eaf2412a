"""One row of the log: what the last steps gave, on the console and in every sink."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from treadle.data.loader import Loader
from treadle.ops.memory import peak_resident_bytes, resident_bytes
from treadle.ops.peak import peak_flops
from treadle.training import guard
from treadle.training.step import StepResult

if TYPE_CHECKING:
    from treadle.training.trainer import Trainer


def log_row(trainer: Trainer, result: StepResult, rate: float, loader: Loader) -> None:
    """Writes the row of the current step and starts the next window."""
    window, state = trainer.window, trainer.state
    means = window.means()
    loss = means.pop(trainer.objective.main, math.nan)
    row: dict[str, Any] = {
        "step": state.step,
        "loss": loss,
        "bpb": window.bits_per_byte(),
        "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan,
        "learning_rate": rate,
        "grad_norm": result.grad_norm,
        "tokens": state.tokens,
        "epoch": state.step * trainer.plan.global_batch / len(trainer.dataset),
        "tokens_per_second": window.step_tokens / max(1e-9, window.step_seconds),
        "memory_gb": _memory_gb(trainer),
        "data_wait": loader.waited,
        "seconds": state.seconds,
        "skipped_steps": state.skipped_steps,
        **{f"loss_{name}": value for name, value in means.items()},
        **_means(trainer, result),
    }
    remaining = (trainer.plan.max_steps - state.step) * window.step_seconds / max(1, window.steps)
    if row["bpb"] is None or not trainer.objective.in_nats:
        del row["bpb"]
    if not trainer.objective.in_nats:
        del row["perplexity"]
    peak = peak_flops(trainer.device)
    if peak is not None:
        row["mfu"] = _step_flops(trainer) * window.steps / max(1e-9, window.step_seconds) / (peak * trainer.world.size)
    if trainer.inspection is not None:
        row.update(trainer.inspection.row())
    guard.report(trainer, trainer.health.waiting(loader.wait_share(), loader.computed))
    trainer.last_row = row
    for sink in trainer.sinks:
        sink.train(row)
    trainer.console.row(row, trainer.plan.max_steps, remaining)
    trainer.tell("log", row)
    window.reset()


def _means(trainer: Trainer, result: StepResult) -> dict[str, float]:
    """The model's statistics of the step, averaged over the processes' rows."""
    values = trainer.world.all_reduce_sum([float(value) for value in result.stats.values()]) if result.stats else []
    return {name: value / trainer.world.size for name, value in zip(result.stats, values)}


def _step_flops(trainer: Trainer) -> float:
    """Forward and backward (twice the forward) of one step, recomputation not counted (PaLM, appendix B)."""
    return 3.0 * trainer.model.flops(trainer.dataset.seq_len) * trainer.plan.global_batch


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held so far, on its device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_resident_bytes() / 1e9


def _memory_gb(trainer: Trainer) -> float:
    if trainer.device.type == "cuda":
        return peak_memory_gb(trainer.device)
    return resident_bytes() / 1e9
