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
    """Seconds to the end at `step_seconds` a step. Each pause counts as long as the last one of its kind took (context.pauses). Before the
    first evaluation of a start its forward passes count, a third of a step's work for as many tokens; a save counts nothing before the first."""
    plan, step = context.plan, context.step
    to_come = pauses_left(max(1, step), plan.max_steps, plan.eval_steps, plan.save_steps)
    pauses = {EVALUATION: step_seconds * _evaluation_over_step(context) / 3, **context.pauses}
    return (plan.max_steps - step) * step_seconds + sum(to_come[kind] * seconds for kind, seconds in pauses.items())


def _evaluation_over_step(context: Context) -> float:
    """Tokens that an evaluation reads over those of a step; 0 where there is none, or nobody knows how many rows it has."""
    data, wanted = context.eval_dataset, context.config.eval.eval_rows
    rows = data.rows_per_epoch if data is not None else None
    if data is None or rows is None:
        return 0.0
    return min(rows, wanted or rows) * data.seq_len / (context.plan.global_batch * context.dataset.seq_len)
