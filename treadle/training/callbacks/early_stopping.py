"""Changes nothing; asks for the end of training when evaluations stop getting better, or are good enough."""

from __future__ import annotations

import math
from typing import Any

from treadle.training.callbacks.base import Callback
from treadle.training.callbacks.best_model import metric_of
from treadle.training.context import Context


class EarlyStopping(Callback):
    """eval.early_stopping_patience, eval.early_stopping_threshold and eval.target_loss, of eval.early_stopping_metric."""

    name = "early_stopping"
    to_go_on = "--early_stopping_patience none --target_loss none"

    def __init__(self) -> None:
        self.best: float | None = None
        self.stale = 0

    def wanted(self, context: Context) -> bool:
        return context.eval_dataset is not None or context.config.eval.target_loss_on == "train"  # what it remembers counts when patience is set later

    def may_end(self, context: Context) -> bool:
        return context.config.eval.early_stopping_patience is not None or context.config.eval.target_loss is not None

    def on_evaluate(self, context: Context) -> None:
        wanted = context.config.eval
        name = wanted.early_stopping_metric
        value = metric_of(context, name, "eval.early_stopping_metric")
        lower = context.objective.metric(name).lower_is_better
        sign = 1 if lower else -1
        bar = math.inf if self.best is None else sign * self.best - wanted.early_stopping_threshold
        if sign * value < bar:
            self.best, self.stale = value, 0
        else:
            self.stale += 1
        patience = wanted.early_stopping_patience
        loss = context.metrics["loss"]
        if wanted.target_loss is not None and wanted.target_loss_on == "validation" and loss <= wanted.target_loss:
            rows = "all" if wanted.eval_rows is None else f"{wanted.eval_rows:,}"
            self._end(context, f"target_loss {wanted.target_loss} is reached: {loss:.4f} on validation, over {rows} rows")
        elif patience is not None and self.stale >= patience:
            self._end(context, f"no better {name} in {patience} evaluations")

    def on_log(self, context: Context) -> None:
        wanted, loss = context.config.eval, context.row.get("loss")
        if wanted.target_loss is None or wanted.target_loss_on != "train" or loss is None or context.step < context.config.log.logging_steps:
            return
        if loss <= wanted.target_loss:
            steps = context.config.log.logging_steps
            self._end(context, f"target_loss {wanted.target_loss} is reached: {loss:.4f} in training, over the last {steps} steps")

    def _end(self, context: Context, reason: str) -> None:
        context.say(f"{reason}; training ends")
        context.end(reason)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stale": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.stale = state.get("best"), int(state.get("stale", 0))
