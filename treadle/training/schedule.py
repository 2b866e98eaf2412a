"""Changes nothing: the learning rate, and what else a schedule says, as pure functions of the step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from treadle.training.settings import OptimSettings

WARMUP_SHARE, LONGEST_WARMUP = 0.02, 2000


def value_at(table: Sequence[tuple[int, int]], step: int) -> int:
    """What [[0, n], [step, n], ...] says for step number `step` (0-based)."""
    return table[bisect.bisect_right(table, step, key=lambda row: row[0]) - 1][1]


def sum_before(table: Sequence[tuple[int, int]], step: int) -> int:
    """The sum of what it says for all steps before `step`."""
    ends = [*(first for first, _ in table[1:]), step]
    return sum(n * max(0, min(end, step) - first) for (first, n), end in zip(table, ends))


def warmup_steps(settings: OptimSettings, max_steps: int) -> int:
    """Steps of linear rise: as given, else 2% of the run, at most 2000."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return min(LONGEST_WARMUP, max(1, round(WARMUP_SHARE * max_steps)))


def learning_rate(settings: OptimSettings, step: int, max_steps: int) -> float:
    """The rate of step number `step` (0-based) of `max_steps`.

    Linear rise to the peak in the warm-up, then cosine (Loshchilov and Hutter 2017, arXiv 1608.03983), linear, constant,
    or wsd: constant, then 1 - sqrt in the last decay_fraction (Hägele et al. 2024, arXiv 2405.18392).
    """
    peak, warmup = settings.learning_rate, warmup_steps(settings, max_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    # The final rate is a share of the peak, so that halving the peak halves every step's rate exactly.
    floor = settings.min_lr_ratio if settings.min_lr is None else settings.min_lr / peak
    remaining = max(1, max_steps - warmup)
    progress = min(1.0, (step + 1 - warmup) / remaining)
    if settings.lr_scheduler_type == "constant":
        share = 1.0
    elif settings.lr_scheduler_type == "linear":
        share = 1 - progress
    elif settings.lr_scheduler_type == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_from = max_steps - settings.decay_fraction * max_steps
        behind = (step + 1 - max(decay_from, warmup)) / max(1.0, max_steps - max(decay_from, warmup))
        share = 1.0 if behind <= 0 else 1 - math.sqrt(min(1.0, behind))
    return peak * (floor + (1 - floor) * share)
