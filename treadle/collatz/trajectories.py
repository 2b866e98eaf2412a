"""Many trajectories at once: exact parities and stopping times of numbers below 2^128, given as two limbs of 64 bits.

With numba (extra `collatz`) one compiled loop a number, else numpy over all of them; a number that would leave 128 bits on
its way is flagged and replayed in Python integers, so that all ways give the same, exact results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from treadle.collatz import compiled
from treadle.collatz.arithmetic import delay
from treadle.collatz.arithmetic import parities as parities_of
from treadle.errors import ConfigError

U64 = np.uint64
MASK64 = (1 << 64) - 1
THIRD, TWO_THIRDS = 0x5555555555555555, 0xAAAAAAAAAAAAAAAA  # floor(2^64 / 3), floor(2^65 / 3)
OVERFLOW = -1
PATHS = ("numba", "numpy", "python")


def limbs(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Integers in [0, 2^128) as (low, high), uint64 [B] each."""
    for n in numbers:
        if not 0 <= n < 1 << 128:
            raise ConfigError(f"{n} does not fit 128 bits")
    return tuple(np.array([n >> shift & MASK64 for n in numbers], dtype=U64) for shift in (0, 64))  # type: ignore[return-value]


def delays(low: np.ndarray, high: np.ndarray, path: str = "auto") -> np.ndarray:
    """Standard steps of each number high 2^64 + low >= 1 down to 1, int64 [B]."""
    return labels(low, high, 0, True, path)[1]


def labels(low: np.ndarray, high: np.ndarray, length: int, shortcut: bool, path: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    """The first `length` parities (1 = odd; in shortcut or standard steps), uint8 [B, length], and the standard steps to 1, int64
    [B]. path: auto, numba, numpy or python; all give the same. ConfigError for a 0 among the numbers."""
    low, high = np.ascontiguousarray(low, dtype=U64), np.ascontiguousarray(high, dtype=U64)
    if not ((low | high) != 0).all():
        raise ConfigError("0 has no trajectory to 1")
    if path == "python":
        found, steps = np.empty((len(low), length), dtype=np.uint8), np.full(len(low), OVERFLOW, dtype=np.int64)
    else:
        run = _compiled() if compiled.resolved(path, PATHS, "trajectories") == "numba" else None
        found, steps = (run or _vectorised)(low, high, length, shortcut)
    for row in np.flatnonzero(steps == OVERFLOW).tolist():
        n = (int(high[row]) << 64) | int(low[row])
        steps[row] = delay(n)
        found[row] = parities_of(n, length, shortcut)
    return found, steps


def _vectorised(low: np.ndarray, high: np.ndarray, length: int, shortcut: bool) -> tuple[np.ndarray, np.ndarray]:
    """Both limbs of all numbers side by side; a number leaves when it has come to 1 and has shown its parities."""
    found, steps = np.zeros((len(low), length), dtype=np.uint8), np.zeros(len(low), dtype=np.int64)
    rows, lo, hi = np.arange(len(low)), low.copy(), high.copy()
    one, place = U64(1), 0
    done = (lo == one) & (hi == 0)  # has been at 1: what follows are parities alone
    with np.errstate(over="ignore"):
        while len(rows):
            odd = (lo & one).astype(bool)
            if place < length:
                found[rows, place] = odd
            place += 1
            too_large = odd & (hi >= U64(THIRD))
            steps[rows[too_large & ~done]] = OVERFLOW
            tripled = lo * U64(3)
            carry = (lo > U64(THIRD)).astype(U64) + (lo > U64(TWO_THIRDS)).astype(U64)
            plus = tripled + one
            up_hi = hi * U64(3) + carry + (plus == 0).astype(U64)
            lo, hi = np.where(odd, plus, lo), np.where(odd, up_hi, hi)
            halve = np.ones_like(odd) if shortcut else ~odd
            counted = 1 + (odd & halve).astype(np.int64)
            lo = np.where(halve, (lo >> one) | (hi << U64(63)), lo)
            hi = np.where(halve, hi >> one, hi)
            at_work = ~done & ~too_large
            steps[rows[at_work]] += counted[at_work]
            done |= (lo == one) & (hi == 0)
            stays = ~too_large & (~done | (place < length))
            if not stays.all():
                rows, lo, hi, done = rows[stays], lo[stays], hi[stays], done[stays]
    return found, steps


@functools.cache
def _compiled() -> Callable[..., tuple[np.ndarray, np.ndarray]] | None:
    """The numba loop; None where numba is not installed."""
    module = compiled.load("trajectories_numba")
    if module is None:
        return None

    def run(low: np.ndarray, high: np.ndarray, length: int, shortcut: bool) -> tuple[np.ndarray, np.ndarray]:
        found, steps = np.empty((len(low), length), dtype=np.uint8), np.empty(len(low), dtype=np.int64)
        module.rows(low, high, shortcut, found, steps)
        return found, steps

    return run
