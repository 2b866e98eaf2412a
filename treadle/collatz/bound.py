"""How long a non-trivial cycle of the 3x + 1 map must be, given that all numbers below a limit reach 1.

Eliahou (1993, Discrete Math. 118, Theorem 2.1): a cycle of K shortcut steps, K1 of them odd, with least member m satisfies

    log2 3 < K / K1 <= log2(3 + 1 / m),

since the product of 3 + 1 / n over its odd members n is 2^K. The fraction of least numerator in that interval is the first one
on the way down the Stern-Brocot tree (equivalently: by continued fractions), and it has the least denominator too.

Logarithms are enclosed between integers over 2^bits; a result counts when both ends of the enclosure give the same fraction.
"""

from __future__ import annotations

from dataclasses import dataclass

from treadle.collatz.verify import VERIFIED
from treadle.errors import ConfigError

LEAST_BITS = 2000
LARGEST_LIMIT_BITS = 10_000  # 3,010 digits; Python writes at most 4,300


@dataclass(frozen=True)
class Bound:
    """The least possible size of a non-trivial cycle of positive numbers, all of them >= limit."""

    limit: int
    odd_steps: int
    shortcut_steps: int

    @property
    def standard_steps(self) -> int:
        """Steps of n -> n / 2, 3n + 1, which are the members of the cycle."""
        return self.shortcut_steps + self.odd_steps

    def as_dict(self) -> dict[str, object]:
        """For JSON; the limit, which outgrows other readers' integers, as a decimal string."""
        return {"limit": str(self.limit), "odd_steps": self.odd_steps, "shortcut_steps": self.shortcut_steps,
                "standard_steps": self.standard_steps}  # fmt: skip


def cycle_bound(limit: int = VERIFIED) -> Bound:
    """The bound when every n in [1, limit) is known to reach 1. ConfigError for a limit below 3 or beyond 2^10000."""
    if limit < 3 or limit.bit_length() > LARGEST_LIMIT_BITS:
        raise ConfigError(f"the verified limit is a number from 3 to 2^{LARGEST_LIMIT_BITS}, as in treadle collatz bound 2^71")
    bits = max(LEAST_BITS, 4 * limit.bit_length())
    while True:
        below, above = log2_of_3(bits), log2_of_3(bits, limit)
        # The interval lies between these two, and holds everything between the inner ends.
        outer = simplest((below[0], above[1]), bits)
        inner = simplest((below[1], above[0]), bits)
        if outer == inner:
            return Bound(limit, odd_steps=inner[1], shortcut_steps=inner[0])
        bits *= 2


def log2_of_3(bits: int, limit: int | None = None) -> tuple[int, int]:
    """Integers (a, b) with a / 2^bits < log2 3 < b / 2^bits; with a limit m, of log2(3 + 1/m)."""
    more = bits + 64  # of the sums below, each off by less than 2^12 units
    ln2 = 18 * _atanh_of_inverse(26, more) - 2 * _atanh_of_inverse(4801, more) + 8 * _atanh_of_inverse(8749, more)
    ln3 = ln2 + 2 * _atanh_of_inverse(5, more)  # ln(3/2)
    if limit is not None:
        ln3 += 2 * _atanh_of_inverse(6 * limit + 1, more)  # ln(1 + 1/(3m))
    error = (more + 100) * 40
    return ((ln3 - error) << bits) // (ln2 + error) - 1, ((ln3 + error) << bits) // (ln2 - error) + 1


def _atanh_of_inverse(k: int, bits: int) -> int:
    """2^bits atanh(1/k), too small by less than one unit for each of its at most `bits` terms and powers."""
    power, total, place = (1 << bits) // k, 0, 1
    square = k * k
    while power:
        total += power // place
        power //= square
        place += 2
    return total


def simplest(ends: tuple[int, int], bits: int) -> tuple[int, int]:
    """The fraction (numerator, denominator) of least denominator strictly between the ends, each over 2^bits; the ends are
    positive and their first is the smaller."""
    one = 1 << bits
    return _simplest(ends[0], one, ends[1], one)


def _simplest(a: int, b: int, c: int, d: int) -> tuple[int, int]:
    """Of the open interval (a/b, c/d)."""
    wholes = []
    while True:
        whole = a // b
        if (whole + 1) * d < c:  # an integer fits
            p, q = whole + 1, 1
            break
        wholes.append(whole)
        # 1 / (x - whole) turns the interval around; its upper end is infinite where a/b is whole itself.
        a, b, c, d = d, c - whole * d, b, a - whole * b
        if d == 0:
            p, q = a // b + 1, 1
            break
    for whole in reversed(wholes):
        p, q = whole * p + q, p
    return p, q
