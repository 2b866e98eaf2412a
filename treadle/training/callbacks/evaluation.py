"""Changes nothing; asks for an evaluation every eval.eval_steps, before the first step where eval.eval_on_start says so, and for one
that the last start did not get to.
"""

from __future__ import annotations

from typing import Any

from treadle.training.callbacks.base import Callback
from treadle.training.context import Context


class EvaluationSchedule(Callback):
    """Asks for the evaluations that eval.eval_steps and its like want."""

    name = "evaluation"

    def __init__(self) -> None:
        self.evaluated_step = -1

    def wanted(self, context: Context) -> bool:
        return context.eval_dataset is not None

    def on_train_start(self, context: Context) -> None:
        self.after_step(context)

    def after_step(self, context: Context) -> None:
        due = context.due(context.plan.eval_steps) if context.step else context.config.eval.eval_on_start
        if due and context.step > self.evaluated_step:
            context.request("evaluate", "due")

    def on_evaluate(self, context: Context) -> None:
        self.evaluated_step = context.step

    def state_dict(self) -> dict[str, Any]:
        return {"evaluated_step": self.evaluated_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluated_step = int(state.get("evaluated_step", -1))
