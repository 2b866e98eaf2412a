"""Changes nothing; asks for a checkpoint every checkpoint.save_steps (the loop saves the last step by itself)."""

from __future__ import annotations

from treadle.training.callbacks.base import Callback
from treadle.training.context import Context


class CheckpointSchedule(Callback):
    """Asks for the checkpoints that checkpoint.save_steps wants."""

    name = "checkpoint"

    def after_step(self, context: Context) -> None:
        if context.due(context.plan.save_steps):
            context.request("save", "due")
