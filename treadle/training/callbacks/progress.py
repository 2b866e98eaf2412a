"""Changes the log alone: one row every log.logging_steps, on the console and in every sink, and one an evaluation."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from treadle.monitor.sinks import SINKS, Sink
from treadle.objectives.base import TOTAL
from treadle.objectives.sums import LossSums
from treadle.ops.memory import peak_memory_gb, resident_bytes
from treadle.ops.peak import peak_flops
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context
from treadle.training.remaining import pause_kind, seconds_left


class Progress(Callback):
    """Its sums go into the checkpoint, so that the first row after a resume is the row that an uninterrupted run would have
    written."""

    name = "progress"

    def __init__(self) -> None:
        self.sinks: list[Sink] = []
        self.pause_began: float | None = None  # None: what comes before the next step is no pause alone
        self.load_state_dict({})

    def on_train_start(self, context: Context) -> None:
        self._open_sinks(context)

    def on_rollback(self, context: Context) -> None:
        self._open_sinks(context)
        self.pause_began = None

    def before_step(self, context: Context) -> None:
        if self.pause_began is not None and (kind := pause_kind(context)) is not None:
            context.pauses[kind] = time.perf_counter() - self.pause_began

    def _open_sinks(self, context: Context) -> None:
        """Each without rows after the current step."""
        self.close()
        log = context.config.log
        self.sinks = [
            SINKS.get(name)(context.log_folder, context.step, context.config.name, log.project, context.config.tables())
            for name in (log.report_to if context.is_main_process else ())
        ]

    def after_step(self, context: Context) -> None:
        result = context.result
        assert result is not None
        if not result.skipped:
            self.sums.add(result.losses, result.units, result.counts)
        self.seconds += context.step_seconds
        self.tokens += result.counts.get("tokens", 0)
        self.steps += 1
        context.console.step(context.step)
        if log_due(context, context.step):
            self._log(context)
        self.pause_began = time.perf_counter()

    def _log(self, context: Context) -> None:
        row = self._row(context)
        context.row = row
        remaining = seconds_left(context, self.seconds / max(1, self.steps))
        objective = context.objective
        whole = objective.console_line(row, self.seconds)
        context.console.row(row, objective.training_text(row), context.plan.max_steps, remaining, whole)
        for sink in self.sinks:  # after the line: the first row opens TensorBoard, which takes half a second
            sink.train(row)
        self.load_state_dict({})
        context.tell("on_log")

    def _row(self, context: Context) -> dict[str, Any]:
        state, result, objective = context.state, context.result, context.objective
        assert result is not None
        means = self.sums.means
        row: dict[str, Any] = {
            "step": state.step,
            "loss": objective.total(means) if objective.headline == TOTAL else means.pop(objective.headline, math.nan),
            **objective.training_metrics(self.sums),
            "learning_rate": context.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens": state.tokens,
        }
        if (rows := context.dataset.rows_per_epoch) is not None:
            row["epoch"] = context.plan.rows_before(state.step) / rows
        row |= {
            "tokens_per_second": self.tokens / max(1e-9, self.seconds),
            "memory_gb": _memory_gb(context.device),
            "data_wait": context.data_wait,
            "seconds": state.seconds,
            "skipped_steps": state.skipped_steps,
            **{f"loss_{name}": value for name, value in means.items()},
            **_means(context),
        }
        peak = peak_flops(context.device)
        if peak is not None:
            # Forward and backward (twice the forward), recomputation not counted (PaLM, appendix B).
            plan, whole = context.plan, context.dataset.seq_len
            length = plan.length_at(state.step - 1) or whole
            rows_done = plan.rows_before(state.step) - plan.rows_before(state.step - self.steps)
            flops = 3.0 * context.model.flops(length) * (whole // length) * rows_done
            row["mfu"] = flops / max(1e-9, self.seconds) / (peak * context.world.size)
        return row | context.columns()

    def on_evaluate(self, context: Context) -> None:
        for sink in self.sinks:
            sink.evaluation(context.evaluation_row)
        context.say(f"evaluation at step {context.step}: {context.objective.evaluation_text(context.metrics)}")

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = LossSums(state.get("sums"))
        self.seconds, self.tokens, self.steps = 0.0, 0, 0  # of this start, for the speed


def log_due(context: Context, step: int) -> bool:
    """Whether step number `step` is logged: the first, the last, and every log.logging_steps."""
    return step == 1 or step == context.plan.max_steps or step % context.config.log.logging_steps == 0


def _means(context: Context) -> dict[str, float]:
    """The model's statistics of the step, averaged over the processes' rows."""
    stats = context.result.stats if context.result is not None else {}
    values = context.world.all_reduce_sum([float(value) for value in stats.values()]) if stats else []
    return {name: value / context.world.size for name, value in zip(stats, values)}


def _memory_gb(device: torch.device) -> float:
    return peak_memory_gb(device) if device.type == "cuda" else resident_bytes() / 1e9
