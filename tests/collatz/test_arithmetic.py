"""Exact trajectories, and numbers as people write them."""

from __future__ import annotations

import pytest

from treadle.collatz.arithmetic import Map, delay, maximum, number, parities, shortcut_delay, spelled, trajectory
from treadle.errors import ConfigError

DELAYS = {27: 111, 837799: 524, 63728127: 949, 9780657630: 1132, 12327829503: 543, 93571393692802302: 2091,
          31153134272529334592918102608969727: 1247}  # fmt: skip


@pytest.mark.parametrize("n, steps", DELAYS.items())
def test_delays(n: int, steps: int) -> None:
    assert delay(n) == steps == len(trajectory(n)) - 1
    assert shortcut_delay(n) == steps - sum(m & 1 for m in trajectory(n)[:-1])


def test_maxima() -> None:
    assert maximum(27) == 9232 == max(trajectory(27))
    assert maximum(1980976057694848447) == 64024667322193133530165877294264738020
    assert max(trajectory(31153134272529334592918102608969727)) > 2**128


def test_parities() -> None:
    assert parities(27, 6) == [1, 1, 0, 1, 1, 1]
    assert parities(27, 6, shortcut=False) == [1, 0, 1, 0, 0, 1]
    assert parities(1, 4) == [1, 0, 1, 0]


@pytest.mark.parametrize("text, value", [
    ("123", 123), ("1_000", 1000), ("1,000,000", 10**6), ("10^8", 10**8), ("2^68+5", 2**68 + 5), ("2**68 - 1", 2**68 - 1),
    ("3*2^40", 3 * 2**40), ("1e12", 10**12), ("2.5e3", 2500), ("-7", -7), ("2^68+2^20", 2**68 + 2**20), (5, 5),
    ("(2^4+1)*3", 51),
])  # fmt: skip
def test_numbers_as_people_write_them(text: str | int, value: int) -> None:
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "two", "2^68x", "1.5", "2^-1", "2^(10^9)", "__import__('os')", "1e-3", "2.55e1", "9" * 3 + "^" + "9" * 9, "1e99999999"])
def test_what_is_no_number_says_so(text: str) -> None:
    with pytest.raises(ConfigError):
        number(text)


@pytest.mark.parametrize("n, text", [(2**68, "2^68"), (2**68 + 2**36, "2^68+2^36"), (2**68 + 4, "2^68+4"), (1000000, "1,000,000"), (0, "0")])
def test_numbers_as_people_read_them(n: int, text: str) -> None:
    assert spelled(n) == text and number(text) == n


def test_maps() -> None:
    assert Map.parse("3x-1") == Map(3, -1) and str(Map.parse(" 5N + 7 ")) == "5x+7"
    assert trajectory(5, Map(3, -1)) == [5, 14, 7, 20, 10]
    for text in ("3x", "2x+1", "3x+2", "x+1", "3y+1"):
        with pytest.raises(ConfigError):
            Map.parse(text)
