"""Changes the count of steps whose update was left out; asks to go back when too many were in a row."""

from __future__ import annotations

from typing import Any

from treadle.errors import Diverged
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context


class Recovery(Callback):
    """train.nonfinite_limit steps in a row that are not finite: train.on_nonfinite."""

    name = "recovery"

    def __init__(self) -> None:
        self.consecutive = 0

    def after_step(self, context: Context) -> None:
        """Counts steps that were left out; Diverged when too many were and train.on_nonfinite is no rollback."""
        result, step = context.result, context.step
        assert result is not None
        if not result.skipped:
            self.consecutive = 0
            return
        context.state.skipped_steps += 1
        context.emit(result.skipped, step=step, grad_norm=result.grad_norm, rows=context.rows_of_step()[:64])
        if result.skipped == "spike":
            context.warn(f"step {step}: the loss spiked to {result.loss:.3f}; the update was skipped")
            return
        self.consecutive += 1
        so_far = f"({context.state.skipped_steps} so far)"
        context.warn(f"step {step}: loss or gradient is not finite; the step was skipped {so_far}")
        context.alert("anomaly", f"step {step} is not finite and was skipped", step=step)
        # fp16 overflows on purpose while its loss scale settles.
        settling = result.loss_scale is not None and result.loss_scale > 1
        if self.consecutive < context.config.train.nonfinite_limit or settling:
            return
        first = step - self.consecutive + 1
        reason = f"{self.consecutive} steps in a row were not finite (steps {first} to {step})"
        if context.config.train.on_nonfinite == "stop":
            raise Diverged(f"{reason}; the weights of the last checkpoint are sound. Try a lower --learning_rate, more "
                           "--warmup_steps, or --precision fp32")  # fmt: skip
        context.request("rollback", reason)

    def state_dict(self) -> dict[str, Any]:
        return {"consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consecutive = int(state.get("consecutive", 0))
