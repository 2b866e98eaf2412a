"""The bound on cycle lengths: published figures, and a search that knows no logarithm."""

from __future__ import annotations

import pytest

from treadle.collatz.bound import Bound, cycle_bound, log2_of_3
from treadle.errors import ConfigError


@pytest.mark.parametrize("limit, odd, shortcut, standard", [
    (2**40, 10_781_274, 17_087_915, 27_869_189),  # Eliahou 1993
    (2**68, 72_057_431_991, 114_208_327_604, 186_265_759_595),
    (2**71, 72_057_431_991, 114_208_327_604, 186_265_759_595),
])  # fmt: skip
def test_published_figures(limit: int, odd: int, shortcut: int, standard: int) -> None:
    found = cycle_bound(limit)
    assert found == Bound(limit, odd, shortcut) and found.standard_steps == standard
    assert found.as_dict()["limit"] == str(limit)


def least_by_powers(limit: int) -> tuple[int, int]:
    """The least (K1, K) with 3^K1 < 2^K and 2^K limit^K1 <= (3 limit + 1)^K1, in integers."""
    threes, above, limits, odd = 3, 3 * limit + 1, limit, 1
    while True:
        steps = threes.bit_length()
        if limits << steps <= above:
            return odd, steps
        threes, above, limits, odd = 3 * threes, above * (3 * limit + 1), limits * limit, odd + 1


@pytest.mark.parametrize("limit", [*range(3, 60), 99, 255, 1000, 4321, 12345, 99_999])
def test_against_powers(limit: int) -> None:
    found = cycle_bound(limit)
    assert (found.odd_steps, found.shortcut_steps) == least_by_powers(limit)


def test_the_logarithm_is_enclosed() -> None:
    for bits in (80, 2000):
        low, high = log2_of_3(bits)
        assert 0 < high - low <= 3
        for power in (1, 53, 9999):  # floor(power log2 3) is the length of 3^power less one
            assert low * power >> bits == (3**power).bit_length() - 1 == high * power >> bits
    low, high = log2_of_3(64, 5)  # log2(16 / 5) = 4 - log2 5
    assert 5**1000 > 2 ** (4000 - (high * 1000 >> 64) - 1) and 5**1000 < 2 ** (4000 - (low * 1000 >> 64) + 1)


def test_what_cannot_be_is_said() -> None:
    for limit in (-1, 0, 2, 2**10_000):
        with pytest.raises(ConfigError, match="verified limit"):
            cycle_bound(limit)


def test_large_limits_take_more_digits() -> None:
    bits = cycle_bound(2**3000).shortcut_steps.bit_length()
    assert 1490 < bits < 1520  # a fraction in an interval of width w has a denominator of about w^-1/2
