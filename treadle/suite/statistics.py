"""Means, spreads and paired differences over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

# Two-sided 95% quantiles of Student's t by degrees of freedom 1 to 30 (a standard table).
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
       2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def t95(degrees: int) -> float:
    """Beyond 30 degrees the normal quantile with its first correction, z + (z^3 + z) / (4 df)."""
    return T95[degrees - 1] if degrees <= len(T95) else 1.960 + (1.960**3 + 1.960) / (4 * degrees)


def cell(values: Sequence[float]) -> dict[str, Any] | None:
    """A cell of the table: mean, the lowest and the highest of the seeds, and all of them."""
    values = [float(value) for value in values if math.isfinite(value)]
    if not values:
        return None
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values), "values": values}


def paired(own: dict[int, float], other: dict[int, float]) -> dict[str, Any] | None:
    """The mean of own - other over the seeds that both have, and its 95% interval (Student's t over the differences); without an
    interval (low, high: None) where there is one seed, None where there is none."""
    differences = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
    if not differences:
        return None
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return {"difference": mean, "low": None, "high": None, "seeds": 1}
    half = t95(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return {"difference": mean, "low": mean - half, "high": mean + half, "seeds": len(differences)}
