"""Proving a block [high 2^bits, (high + 1) 2^bits): its units, what is recorded of each, and the ways to compute it.

What a unit's Totals prove, if `unresolved` is empty: every n >= 2 of the unit has, under the 3x + 1 map, a smaller number
among its own successors, or a smaller number that leads to one of its successors. So if all numbers below the block reach
1, those of the block do, in ascending order (induction). Numbers from sieve.FLOOR on are either excluded by the sieve, each
with such a witness, or candidates, which are followed until their height says that they have come below their start.

All paths give the same Totals: "python" is the reference, "numpy" works on arrays, "numba" is compiled (extra `collatz`).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from treadle.collatz import sieve as sieves
from treadle.errors import ConfigError, MissingExtra

ALGORITHM = "tree-1"  # of the sieve and the statistics; a new one whenever any total could change
PATHS = ("numba", "numpy", "python")
MODULES = {"numba": "treadle.collatz.kernel_unit", "numpy": "treadle.collatz.blocks_numpy"}
JUMP = 16  # shortcut steps between two looks at the height of a candidate
FIRST_LOOK = 32  # steps below the tree
MOST_STEPS = (
    100_000  # a candidate that is not below its start by then may be a counterexample; near 2^100, 2,500 are many
)
OVERFLOW = 1 << 128
SMALLEST_BITS, LARGEST_BITS = 8, 44
PREFIX_BITS = 8
LARGEST_NUMBER = 1 << 1000


@dataclass(frozen=True)
class Unit:
    """The n in [high 2^bits, (high + 1) 2^bits) with n mod 2^prefix_bits == prefix."""

    high: int
    bits: int
    prefix: int
    prefix_bits: int

    def __post_init__(self) -> None:
        if not SMALLEST_BITS <= self.bits <= LARGEST_BITS:
            raise ConfigError(
                f"a block has 2^{SMALLEST_BITS} to 2^{LARGEST_BITS} numbers, not 2^{self.bits}; set bits to 36"
            )
        if self.high < 0 or (self.high + 1) << self.bits > LARGEST_NUMBER:
            raise ConfigError(f"block {self.high} of 2^{self.bits} numbers: only 0 to 2^1000 can be verified")
        if not 0 <= self.prefix_bits <= sieves.depth(self.bits) or not 0 <= self.prefix < 1 << self.prefix_bits:
            raise ConfigError(
                f"prefix {self.prefix} of {self.prefix_bits} bits does not fit a block of 2^{self.bits}: "
                f"at most {sieves.depth(self.bits)} bits, and the prefix below 2 to that power"
            )

    @property
    def start(self) -> int:
        """The block's first number."""
        return self.high << self.bits

    @property
    def size(self) -> int:
        """How many numbers the unit holds."""
        return 1 << self.bits - self.prefix_bits

    def first(self, residue: int, modulus_bits: int) -> Iterator[int]:
        """The unit's numbers that are `residue` modulo 2^modulus_bits, ascending."""
        common = min(modulus_bits, self.prefix_bits)
        if (self.prefix ^ residue) & ((1 << common) - 1) == 0:
            step = 1 << max(modulus_bits, self.prefix_bits)
            yield from range(self.start + max(self.prefix, residue), self.start + (1 << self.bits), step)


@dataclass(frozen=True)
class Totals:
    """What was found in a unit, the same on every path."""

    leaves: int = 0  # residues modulo 2^(bits - 6) that the tree reached
    candidates: int = 0  # numbers that had to be followed
    jumps: int = (
        0  # looks at a candidate's height, FIRST_LOOK steps below the tree and then every JUMP, until it is at most 0
    )
    odd_steps: int = (
        0  # of all candidates, up to their last look; for numbers below FLOOR and sieve "none" up to the first
    )
    # number below the start, which makes it the alpha checksum of Barina (J. Supercomput. 77, 2021) over n = 3 mod 4
    maximum: int = 0  # the largest number that a candidate meets, standard steps, before it first comes below itself
    argmax: int = 0  # the smallest candidate that meets it
    overflow: tuple[int, ...] = ()  # candidates that meet a number of more than 128 bits, ascending
    unresolved: tuple[int, ...] = ()  # candidates not below their start after MOST_STEPS: nothing is proved for them

    def merge(self, other: Totals) -> Totals:
        """Of two disjoint sets of numbers; the order does not matter."""
        maximum = max(self.maximum, other.maximum)
        return Totals(
            self.leaves + other.leaves,
            self.candidates + other.candidates,
            self.jumps + other.jumps,
            self.odd_steps + other.odd_steps,
            maximum,
            min(each.argmax for each in (self, other) if each.maximum == maximum),
            tuple(sorted(self.overflow + other.overflow)),
            tuple(sorted(self.unresolved + other.unresolved)),
        )

    @staticmethod
    def total(parts: Iterable[Totals]) -> Totals:
        found = Totals()
        for part in parts:
            found = found.merge(part)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts as integers, numbers of the trajectories as decimal strings."""
        return {
            "leaves": self.leaves,
            "candidates": self.candidates,
            "jumps": self.jumps,
            "odd_steps": self.odd_steps,
            "maximum": str(self.maximum),
            "argmax": str(self.argmax),
            "overflow": [str(n) for n in self.overflow],
            "unresolved": [str(n) for n in self.unresolved],
        }

    @staticmethod
    def from_dict(given: dict[str, Any]) -> Totals:
        """The inverse of as_dict; KeyError, TypeError or ValueError for anything else."""
        counts = [given[name] for name in ("leaves", "candidates", "jumps", "odd_steps")]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"counts are integers of at least 0, not {counts}")
        overflow, unresolved = (tuple(_natural(n) for n in given[name]) for name in ("overflow", "unresolved"))
        leaves, candidates, jumps, odd_steps = counts
        most, at = _natural(given["maximum"]), _natural(given["argmax"])
        return Totals(leaves, candidates, jumps, odd_steps, most, at, overflow, unresolved)


def _natural(text: Any) -> int:
    if not isinstance(text, str) or not text.isascii() or not text.isdigit() or len(text) > 100_000:
        raise ValueError(f"{text!r} is not a number in decimal digits")
    return int(text)


def units(high: int, bits: int, sieve: str = "tree") -> list[Unit]:
    """The block's units by its low bits, costliest first. Prefixes that the sieve excludes altogether are left out."""
    rules = _rules(sieve)
    Unit(high, bits, 0, 0)
    width = min(PREFIX_BITS, sieves.depth(bits))
    split = [Unit(high, bits, prefix, width) for prefix in range(1 << width)]
    split.sort(key=lambda unit: -sieves.height(unit.prefix, width))  # two workers then end together
    if rules is None:
        return [unit for unit in split if unit.prefix % 4 == 3]
    if high << bits < sieves.FLOOR:  # the sieve holds from there on only
        return split
    return [unit for unit in split if not sieves.excluded(unit.prefix, width, rules)]


def run_unit(unit: Unit, path: str = "auto", sieve: str = "tree") -> Totals:
    """Verifies a unit.

    path: "numba", "numpy" or "python"; "auto" is the first that is installed. sieve: "tree", or "none" to follow every
    n = 3 mod 4 (all others come below themselves in at most two steps), or "descent", without merging and preimages.
    "broken" is for tests of the audit.
    """
    rules = _rules(sieve)
    path = resolved(path)
    if rules is None:
        return every(unit.first(3, 2)) if path == "python" else _on(path).every_third(unit)
    found = Totals()
    if unit.start < sieves.FLOOR:
        found = every(n for n in unit.first(3, 2) if n < sieves.FLOOR)
    if unit.start + (1 << unit.bits) > sieves.FLOOR:
        found = found.merge(_followed(unit, rules) if path == "python" else _on(path).followed(unit, rules))
    return found


def candidates(unit: Unit, path: str = "auto", sieve: str | sieves.Rules = "tree") -> list[int]:
    """The numbers of a unit, from sieve.FLOOR on, that the sieve lets through, ascending: what an audit looks at."""
    rules = sieve if isinstance(sieve, sieves.Rules) else _rules(sieve)
    if rules is None:
        raise ConfigError('with sieve "none" nothing is excluded, so there is nothing to list; use "tree"')
    path = resolved(path)
    if path == "python":
        return sorted(_candidates(unit, rules))
    return sorted(_on(path).candidates(unit, rules))


@cache
def installed() -> tuple[str, ...]:
    """The paths that can be taken here, fastest first."""
    return tuple(path for path in PATHS if path == "python" or importlib.util.find_spec(path) is not None)


def resolved(path: str) -> str:
    """The path that `path` stands for here."""
    if path == "auto":
        return installed()[0]
    if path not in PATHS:
        raise ConfigError(f"no path {path!r}; there are auto, {', '.join(PATHS)}")
    if path not in installed():
        raise MissingExtra("the compiled path of the verifier", "collatz")
    return path


def _on(path: str) -> Any:
    return importlib.import_module(MODULES[path])


def _rules(sieve: str) -> sieves.Rules | None:
    if sieve == "none":
        return None
    if sieve not in sieves.RULES:
        raise ConfigError(f"no sieve {sieve!r}; there are tree, descent and none")
    return sieves.RULES[sieve]


def _candidates(unit: Unit, rules: sieves.Rules, seen: Callable[[], None] = lambda: None) -> Iterator[int]:
    for leaf in sieves.leaves(unit.high, unit.bits, unit.prefix, unit.prefix_bits, rules):
        seen()
        for n in sieves.survivors(leaf, unit.high, unit.bits, rules):
            if n >= sieves.FLOOR:
                yield n


def _followed(unit: Unit, rules: sieves.Rules) -> Totals:
    found, count = Totals(), [0]

    def seen() -> None:
        count[0] += 1

    for n in _candidates(unit, rules, seen):
        found = found.merge(follow(n, sieves.depth(unit.bits)))
    return found.merge(Totals(leaves=count[0]))


def follow(n: int, depth: int) -> Totals:
    """The exact reference for one candidate of a tree that ends at `depth`."""
    depth += FIRST_LOOK - JUMP
    y, height, odd_steps, most, below = n, 0, 0, n, False
    for steps in range(1, MOST_STEPS + 1):
        if y & 1:
            y = 3 * y + 1
            height += sieves.UP
            odd_steps += 1
            if not below and y > most:
                most = y
        else:
            height -= sieves.DOWN
        y >>= 1
        below = below or y < n
        if height <= 0 and steps > depth and (steps - depth) % JUMP == 0:
            return Totals(0, 1, (steps - depth) // JUMP, odd_steps, most, n, (n,) if most >= OVERFLOW else ())
    return Totals(0, 1, 0, 0, most, n, (), (n,))


def direct(n: int) -> Totals:
    """The exact reference for one number n >= 2 followed until it first comes below itself."""
    y, odd_steps, most = n, 0, n
    for _ in range(MOST_STEPS):
        if y & 1:
            y = 3 * y + 1
            odd_steps += 1
            most = max(most, y)
        y >>= 1
        if y < n:
            return Totals(0, 1, 0, odd_steps, most, n, (n,) if most >= OVERFLOW else ())
    return Totals(0, 1, 0, 0, most, n, (), (n,))


def every(numbers: Iterable[int]) -> Totals:
    return Totals.total(direct(n) for n in numbers)
