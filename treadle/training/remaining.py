"""Changes nothing: how long a training still takes, the pauses between its steps (evaluations, samples, saves) included."""

from __future__ import annotations

import math

from treadle.training.context import Context

EVALUATION, SAVE = "evaluation", "save"


def pause_kind(context: Context) -> str | None:
    """What is due between the step that is done and the next. An evaluation's pause has its samples in it, and the save of the same step."""
    plan = context.plan
    return EVALUATION if context.due(plan.eval_steps) else SAVE if context.due(plan.save_steps) else None


def pauses_left(step: int, last: int, eval_steps: int, save_steps: int) -> dict[str, int]:
    """How many pauses of each kind are still to come after step number `step` (1 or more), the one after `step` itself among them."""

    def multiples(every: int) -> int:
        return (last - 1) // every - (step - 1) // every

    evaluations = multiples(eval_steps) + 1  # one after the last step, whatever its number
    return {EVALUATION: evaluations, SAVE: multiples(save_steps) - multiples(math.lcm(eval_steps, save_steps))}


def seconds_left(context: Context, step_seconds: float) -> float:
    """Seconds to the end at `step_seconds` a step. Each pause counts as long as the last one of its kind took (context.pauses); of a
    kind that there was none of since this start nothing is known, and it counts nothing."""
    plan, step = context.plan, context.step
    to_come = pauses_left(max(1, step), plan.max_steps, plan.eval_steps, plan.save_steps)
    return (plan.max_steps - step) * step_seconds + sum(to_come[kind] * seconds for kind, seconds in context.pauses.items())
