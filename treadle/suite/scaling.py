"""A power law through several sizes, with what is not known about it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from treadle.suite.statistics import t95

FEWEST = 3  # sizes: two points lie on every power law


def fit(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """points: (parameters, value), one a size, value > 0. value = factor parameters^-exponent by least squares of the logarithms
    (the form of Kaplan et al. 2020, arXiv 2001.08361, without an irreducible part, which so few sizes cannot tell), with the 95%
    interval of the exponent (Student's t, sizes - 2 degrees of freedom). "refused" says why there is no fit."""
    if len({size for size, _ in points}) < FEWEST:
        return {"refused": f"{len(points)} size(s): a power law needs at least {FEWEST}; add sizes"}
    if any(value <= 0 for _, value in points):
        return {"refused": "a power law needs values above 0"}
    x, y = [math.log(size) for size, _ in points], [math.log(value) for _, value in points]
    middle_x, middle_y = statistics.mean(x), statistics.mean(y)
    spread = sum((one - middle_x) ** 2 for one in x)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y)) / spread
    rest = sum((b - middle_y - slope * (a - middle_x)) ** 2 for a, b in zip(x, y))
    degrees = len(points) - 2
    half = t95(degrees) * math.sqrt(rest / degrees / spread)
    return {"exponent": -slope, "low": -slope - half, "high": -slope + half, "factor": math.exp(middle_y - slope * middle_x),
            "residual": math.sqrt(rest / len(points)), "sizes": len(points)}  # fmt: skip
