"""What to do about a step that went wrong: skip it, say it, go back, or stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle.errors import Diverged
from treadle.monitor.health import Finding
from treadle.training import snapshot
from treadle.training.step import StepResult

if TYPE_CHECKING:
    from treadle.training.trainer import Trainer

LAST_ROLLBACK = 3  # the third one ends the run


def skipped(trainer: Trainer, result: StepResult) -> str:
    """Counts a step whose update was left out, with its rows; returns why to roll back after too many in a row."""
    state = trainer.state
    state.skipped_steps += 1
    rows = trainer.batches.rows_of(state.step - 1 + state.data_offset)
    trainer.event(result.skipped, step=state.step, grad_norm=result.grad_norm, rows=rows[:64])
    if result.skipped == "spike":
        trainer.console.warn(f"step {state.step}: the loss spiked to {result.loss:.3f}; the update was skipped")
        return ""
    state.consecutive_skips += 1
    so_far = f"({state.skipped_steps} so far)"
    trainer.console.warn(f"step {state.step}: loss or gradient is not finite; the step was skipped {so_far}")
    trainer.alerts.send("anomaly", f"step {state.step} is not finite and was skipped", step=state.step)
    # fp16 overflows on purpose while its loss scale settles.
    settling = trainer.stepper.loss_scale is not None and trainer.stepper.loss_scale.scale > 1
    if state.consecutive_skips < trainer.recipe.train.nonfinite_limit or settling:
        return ""
    first = state.step - state.consecutive_skips + 1
    reason = f"{state.consecutive_skips} steps in a row were not finite (steps {first} to {state.step})"
    if trainer.recipe.train.on_nonfinite == "stop":
        raise Diverged(f"{reason}; the weights of the last checkpoint are sound. Try a lower --learning_rate, more "
                       "--warmup_steps, or --precision fp32")  # fmt: skip
    return reason


def report(trainer: Trainer, findings: list[Finding]) -> str:
    """Says what was found; returns why to roll back when the configuration asks for it."""
    policy = trainer.recipe.train.on_spike
    for finding in findings:
        trainer.event(finding.kind, step=trainer.state.step, text=finding.text)
        trainer.console.warn(finding.text)
        trainer.alerts.send("anomaly", finding.text, kind=finding.kind, step=trainer.state.step)
        if finding.kind == "loss_spike" and policy == "stop":
                raise Diverged(f"{finding.text}; on_spike = stop. Try a lower --learning_rate, or --on_spike skip")
        if finding.kind == "loss_spike" and policy == "rollback":
            return finding.text
    return ""


def roll_back(trainer: Trainer, reason: str) -> None:
    """Back to the last good checkpoint, past the rows that led here; Diverged the third time or without one."""
    state = trainer.state
    trainer.saver.wait()  # a save in flight may be the one to go back to
    found = snapshot.find_newest(trainer)
    if found is None or found.step >= state.step or state.rollbacks + 1 >= LAST_ROLLBACK:
        why = "there is no checkpoint to go back to" if found is None else f"it is rollback {state.rollbacks + 1}"
        raise Diverged(f"{reason}; {why}. The weights of the last checkpoint are sound. Try a lower --learning_rate, "
                       "more --warmup_steps, or --precision fp32")  # fmt: skip
    rollbacks, offset = state.rollbacks + 1, state.data_offset + state.step - found.step
    trainer.event("rolled_back", step=state.step, to=found.step, reason=reason)
    trainer.console.warn(f"{reason}; back to step {found.step}, skipping the rows of {state.step - found.step} steps")
    snapshot.restore(trainer, found)
    trainer.state.rollbacks, trainer.state.data_offset = rollbacks, offset
    trainer.saved_step = found.step
    trainer.open_sinks()
    trainer.open_batches()
