"""Changes which checkpoint is marked (RUN@best), and asks for one when an evaluation is the best so far."""

from __future__ import annotations

import math
from typing import Any

from treadle.errors import ConfigError
from treadle.registry import nearest
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context


class BestModel(Callback):
    """By checkpoint.metric_for_best_model, in the direction that the objective gives it."""

    name = "best_model"

    def __init__(self) -> None:
        self.value: float | None = None
        self.step: int | None = None

    def on_evaluate(self, context: Context) -> None:
        name = context.config.checkpoint.metric_for_best_model
        value = metric_of(context, name, "checkpoint.metric_for_best_model")
        metric = context.objective.metric(name)
        sign = 1 if metric.lower_is_better else -1
        if not math.isfinite(value) or (self.value is not None and sign * value >= sign * self.value):
            return
        self.value, self.step = value, context.step
        context.request("save", "the best so far")
        context.mark_best({name: value})
        context.alert("best", f"step {context.step}: best {name} {metric.show(value)}", step=context.step)

    def on_restore(self, context: Context) -> None:
        """A kill between a save and its mark, or a return to an older step, leaves a mark that is not this state's."""
        if self.step is not None and self.value is not None:
            context.restore_best(self.step, {context.config.checkpoint.metric_for_best_model: self.value})

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.step = state.get("value"), state.get("step")


def metric_of(context: Context, name: str, key: str) -> float:
    """A metric of the last evaluation; ConfigError that names what there is."""
    if name not in context.metrics:
        raise ConfigError(f"{key} = {name!r} is no metric of this evaluation: {nearest(name, list(context.metrics))}")
    return context.metrics[name]
