"""Spreads, paired differences and scaling laws, beside values worked out by other means."""

from __future__ import annotations

import math
import random

import pytest

from treadle.suite.scaling import fit
from treadle.suite.statistics import cell, paired, t95


def test_the_quantiles_are_students() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    for degrees in (1, 2, 5, 30, 31, 60, 1000):
        assert t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


def test_a_cell_and_a_paired_difference() -> None:
    assert cell([]) is None and cell([2.0, 1.0, float("nan")]) == {"mean": 1.5, "low": 1.0, "high": 2.0, "values": [2.0, 1.0]}
    found = paired({0: 1.0, 1: 2.0, 2: 4.0}, {0: 2.0, 1: 2.5, 2: 4.25, 3: 9.0})
    assert found is not None and found["seeds"] == 3 and found["difference"] == pytest.approx(-7 / 12)
    half = 4.303 * 0.3818813 / math.sqrt(3)  # the deviation of -1, -1/2 and -1/4
    assert (found["low"], found["high"]) == (pytest.approx(-7 / 12 - half, abs=1e-4), pytest.approx(-7 / 12 + half, abs=1e-4))
    assert paired({0: 1.0}, {0: 2.0}) == {"difference": -1.0, "low": None, "high": None, "seeds": 1}
    assert paired({0: 1.0}, {1: 2.0}) is None


def test_a_power_law_is_found_and_its_interval_holds_it() -> None:
    exact = fit([(n, 7.0 * n**-0.08) for n in (1e5, 3e5, 1e6)])
    assert exact["exponent"] == pytest.approx(0.08) and exact["factor"] == pytest.approx(7.0) and exact["high"] - exact["low"] < 1e-6
    drawn, inside = random.Random(0), 0
    for _ in range(400):
        law = fit([(n, 7.0 * n**-0.08 * math.exp(drawn.gauss(0, 0.01))) for n in (1e5, 2e5, 4e5, 8e5)])
        inside += law["low"] <= 0.08 <= law["high"]
    assert 0.92 <= inside / 400 <= 0.98  # a 95% interval


def test_too_few_sizes_are_refused() -> None:
    assert "at least 3" in fit([(1e5, 2.0), (2e5, 1.9)])["refused"] and "above 0" in fit([(1, 1), (2, 0), (3, 1)])["refused"]
