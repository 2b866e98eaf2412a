"""Many trajectories at once: every way gives what Python integers give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.collatz import trajectories
from treadle.collatz.arithmetic import delay, parities
from treadle.collatz.trajectories import delays, labels, limbs
from treadle.errors import ConfigError

from .test_arithmetic import DELAYS

PATHS = ["numpy", "python"] + (["numba"] if trajectories._compiled() is not None else [])
NUMBERS = [1, 2, 3, 4, 5, 2**40, 2**64 - 1, 2**64, 2**127 + 1, 2**128 - 1, 1980976057694848447, *DELAYS]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("length", [0, 1, 40])
def test_every_way_is_exact(path: str, shortcut: bool, length: int) -> None:
    found, steps = labels(*limbs(NUMBERS), length, shortcut, path)
    assert steps.tolist() == [delay(n) for n in NUMBERS] and found.dtype == np.uint8
    assert found.tolist() == [parities(n, length, shortcut) for n in NUMBERS]
    assert delays(*limbs(list(DELAYS)), path).tolist() == list(DELAYS.values())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 2**128 - 1) | st.integers(1, 2**20), min_size=1, max_size=8), st.integers(0, 70), st.booleans())
def test_any_numbers(numbers: list[int], length: int, shortcut: bool) -> None:
    want = labels(*limbs(numbers), length, shortcut, "python")
    for path in PATHS:
        found = labels(*limbs(numbers), length, shortcut, path)
        assert np.array_equal(found[0], want[0]) and np.array_equal(found[1], want[1])


def test_the_replay_is_reached() -> None:
    """31153134272529334592918102608969727 leaves 128 bits on its way."""
    low, high = limbs([31153134272529334592918102608969727, 27])
    for run in (trajectories._vectorised, trajectories._compiled()):
        if run is not None:
            assert run(low, high, 4, True)[1].tolist() == [trajectories.OVERFLOW, 111]


def test_what_cannot_be_is_said() -> None:
    for numbers in ([2**128], [-1]):
        with pytest.raises(ConfigError):
            limbs(numbers)
    with pytest.raises(ConfigError, match="0 has no"):
        delays(*limbs([0]))
