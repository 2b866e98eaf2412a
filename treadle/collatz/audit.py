"""Audit of a block: does every number that the sieve left out have a witness, and do units give the recorded totals again?

Everything converges as far as anyone has looked, so a sieve that leaves out too much never shows in a result. A witness is
searched here in exact integers and without the sieve's tables: within as many steps as the sieve looks ahead, n comes below
itself (descent), or a number below n leads to n (preimage) or to a successor of n (merging). What is found is then followed
forwards. An excluded number without one is unjustified: the block is not proved, although it would have converged too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.collatz import blocks
from treadle.collatz import sieve as sieves
from treadle.collatz.blocks import Totals, Unit
from treadle.errors import ConfigError

# How far back a smaller number is searched. The sieve's 12 odd steps and the 6 of its residues lead back at most 19 steps.
BACK = 20
SMALL = 10  # bits of the numbers in a small block: 1,024


@dataclass(frozen=True)
class Witness:
    """Why n need not be followed: `smaller` < n is, or leads to, the number `meets` that n comes to (or is)."""

    kind: str  # "descent", "preimage" or "merging"
    smaller: int
    meets: int

    def holds(self, n: int, most: int = 1000) -> bool:
        """Follows both, forwards, for at most that many shortcut steps."""
        return 0 < self.smaller < n and _comes_to(n, self.meets, most) and _comes_to(self.smaller, self.meets, most)


@dataclass(frozen=True)
class Report:
    """What an audit of one block looked at and found."""

    high: int
    bits: int
    small_blocks: int
    numbers: int  # in the small blocks
    witnesses: dict[str, int]  # of excluded numbers, by kind
    unjustified: tuple[int, ...]  # excluded numbers without a witness
    recomputed: int  # units computed again
    disagreements: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.unjustified and not self.disagreements

    def as_dict(self) -> dict[str, Any]:
        """For JSON; numbers of the block as decimal strings."""
        unjustified = [str(n) for n in self.unjustified]
        return {**self.__dict__, "high": str(self.high), "unjustified": unjustified, "passed": self.passed,
                "disagreements": list(self.disagreements)}  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        found = ", ".join(f"{count:,} by {kind}" for kind, count in sorted(self.witnesses.items())) or "none"
        said = [
            f"{self.numbers:,} numbers in {self.small_blocks} small blocks; excluded with a witness: {found}",
            f"{self.recomputed} units computed again",
        ]
        said += [f"FAILED: {n} is excluded without a witness" for n in self.unjustified[:10]]
        if len(self.unjustified) > 10:
            said.append(f"FAILED: and {len(self.unjustified) - 10:,} more without a witness")
        return said + [f"FAILED: {text}" for text in self.disagreements]


def audit(
    high: int,
    bits: int,
    totals: Mapping[int, Totals] | None = None,
    samples: int = 8,
    seed: int = 0,
    path: str = "auto",
    sieve: str | sieves.Rules = "tree",
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Audits the block [high 2^bits, (high + 1) 2^bits).

    totals: the recorded totals by the prefix of blocks.units(high, bits), to be computed again. samples: of small blocks,
    and at most of units. seed chooses them. path: as for blocks.run_unit; the small blocks are computed on all paths that
    are installed. sieve: whose exclusions are looked at; other ones than "tree" are for tests.
    """
    if samples < 1:
        raise ConfigError(f"an audit of {samples} samples looks at nothing; take at least 1")
    chance = random.Random(f"{seed} {high} {bits}")
    units = blocks.units(high, bits)
    disagreements: list[str] = []
    kinds: Counter[str] = Counter()
    unjustified: list[int] = []
    chosen = [_small(high, bits, chance, alive=number % 4 != 3) for number in range(samples)]
    for number, unit in enumerate(chosen, 1):
        progress(f"small block {number} of {samples}")
        found, bare = excluded_without(unit, path, sieve)
        kinds += found
        unjustified += bare
        if sieve == "tree":
            disagreements += _differences(unit)
    recomputed = 0
    if totals is not None:
        known = {unit.prefix for unit in units}
        disagreements += [
            f"totals of prefix {prefix}, which is no unit of the block" for prefix in totals if prefix not in known
        ]
        disagreements += [f"no totals of prefix {prefix}" for prefix in sorted(known) if prefix not in totals]
        both = [unit for unit in units if unit.prefix in totals]
        for unit in chance.sample(both, min(samples, len(both))):
            progress(f"unit {recomputed + 1} of {min(samples, len(both))}")
            recomputed += 1
            again = blocks.run_unit(unit, path, sieve if isinstance(sieve, str) else "tree").as_dict()
            recorded = totals[unit.prefix].as_dict()
            names = [name for name in again if again[name] != recorded[name]]
            if names:
                disagreements.append(f"{unit} gives other {', '.join(names)} when it is computed again")
    return Report(
        high, bits, samples, sum(unit.size for unit in chosen), dict(kinds), tuple(sorted(set(unjustified))), recomputed,
        tuple(disagreements),
    )  # fmt: skip


def _small(high: int, bits: int, chance: random.Random, alive: bool) -> Unit:
    """A random small block with the same offset; alive: one that the tree does not leave out as a whole, if there is one."""
    width = max(0, min(bits - SMALL, sieves.depth(bits)))
    prefix = chance.getrandbits(width) if width else 0
    for _ in range(100_000 if alive else 0):
        if not sieves.excluded(prefix, width):
            break
        prefix = chance.getrandbits(width)
    return Unit(high, bits, prefix, width)


def _differences(unit: Unit) -> list[str]:
    """Where the paths that are installed disagree about a small unit."""
    reference = blocks.run_unit(unit, "python")
    return [
        f"{unit}: path {path} gives {found}, python {reference}"
        for path in blocks.installed()
        if path != "python" and (found := blocks.run_unit(unit, path)) != reference
    ]


def excluded_without(
    unit: Unit, path: str = "auto", sieve: str | sieves.Rules = "tree"
) -> tuple[Counter[str], list[int]]:
    """(how many excluded numbers of a small unit have a witness, by kind; those that have none)."""
    followed = set(blocks.candidates(unit, path, sieve))
    steps = sieves.depth(unit.bits) + sieves.lookahead(unit.bits)
    kinds: Counter[str] = Counter()
    without = []
    for n in unit.first(0, 0):
        if n < sieves.FLOOR or n in followed:
            continue
        found = witness(n, steps)
        if found is None or not found.holds(n):
            without.append(n)
        else:
            kinds[found.kind] += 1
    return kinds, without


def witness(n: int, steps: int) -> Witness | None:
    """Of n >= 2 within so many shortcut steps, and BACK steps back from there; None if there is none."""
    path = [n]
    for _ in range(steps):
        y = path[-1]
        path.append((3 * y + 1) >> 1 if y & 1 else y >> 1)
        if path[-1] < n:
            return Witness("descent", path[-1], path[-1])
    for place, y in enumerate(path):
        smaller = _leads_to(y, path[place - 1] if place else 0, n)
        if smaller:
            return Witness("merging" if place else "preimage", smaller, y)
    return None


def _leads_to(y: int, known: int, n: int) -> int:
    """A number below n that leads to y in at most BACK steps, not through `known`; 0 if there is none."""
    todo = [(y, BACK)]
    while todo:
        w, left = todo.pop()
        before = [2 * w, (2 * w - 1) // 3] if w % 3 == 2 else [2 * w]
        for z in before:
            if z == known or z < 2:
                continue
            if z < n:
                return z
            # every step back takes at most a third away, and multiples of three have only their doubles before them
            if left > 1 and z % 3 and z * 2 ** (left - 1) < n * 3 ** (left - 1):
                todo.append((z, left - 1))
        known = 0
    return 0


def _comes_to(n: int, goal: int, most: int) -> bool:
    for _ in range(most):
        if n == goal:
            return True
        n = (3 * n + 1) >> 1 if n & 1 else n >> 1
    return n == goal
