"""The cycles that are known for a map, and what a search says when it finds something else.

PRIMITIVE holds, by (q, c) with c > 0, the members of least absolute value of the cycles whose members have no factor in common
with c: all that are met from |n| <= 10^6 (q = 3) or 10^5 (other q), and all of at most 22 or 20 shortcut steps. It was made by
`recomputed` below, which a test repeats. Every other cycle follows: 0, multiples (d times a cycle of q x + c is one of
q x + d c), and mirror images (q x - c moves -n as q x + c moves n).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

from treadle.collatz.arithmetic import Map, spelled
from treadle.collatz.cycle_search import CYCLE, UNRESOLVED, Limits, examine, follow
from treadle.collatz.cycles import Cycle, algebraic_cycles, cycle_through

PRIMITIVE: dict[tuple[int, int], tuple[int, ...]] = {
    (1, 1): (1,),
    (3, 1): (1, -1, -5, -17),
    (3, 5): (1, 19, 23, 187, 347),
    (3, 7): (5,),
    (3, 11): (1, 13, -19),
    (3, 13): (1, 131, 211, 227, 251, 259, 283, 287, 319),
    (3, 17): (1, 23, -65, -73),
    (3, 19): (5, -115),
    (3, 23): (5, 7, 41, -2263, -2359, -2743, -2963, -3091, -3415, -3743, -4819),
    (3, 25): (7, 17, -113),
    (3, 29): (1, 11, -109, 3811, 7055),
    (3, 31): (13, -95),
    (3, 35): (13, 17),
    (3, 37): (19, 23, 29),
    (3, 41): (1,),
    (3, 43): (1,),
    (3, 47): (5, 25, 65, 73, 85, 89, 101),
    (3, 49): (25, -65),
    (3, 53): (103,),
    (3, 55): (1, 7, 41),
    (3, 59): (1, 133, 149, 181, 185, 217, 221),
    (3, 61): (1, 235),
    (3, 65): (19,),
    (3, 67): (17,),
    (3, 71): (29, 31, 2585, 2809, 3985, 4121, 4409),
    (3, 73): (5, 19, 47),
    (3, 77): (1, -989, -1153, -1165),
    (3, 79): (1, 7, 233, 265),
    (3, 83): (65, 109, 157),
    (3, 85): (7, -293),
    (3, 89): (17,),
    (3, 91): (1, 25, 59),
    (3, 95): (1, 17, 23, -511),
    (3, 97): (1, 13, -505, -625),
    (5, 1): (1, -1, 13, 17),
    (5, 3): (1, -1, 43, 53, 61),
    (5, 7): (1, 9, 57),
    (5, 9): (1, -7, 29, 89),
    (5, 11): (1, -9, 141),
    (5, 13): (3, 53),
    (5, 17): (-7, 9, -83),
    (5, 19): (11,),
    (5, 21): (13, 17),
    (5, 23): (1, 81, 179, 187, 191, 231, 351, 361),
    (5, 27): (1,),
    (5, 31): (-13, -21, -39, -49, 91),
    (5, 33): (1, 181, 293, 329, 337, 359, 421, 479, 511),
    (5, 37): (7, 109),
    (5, 39): (7, -41, 179, 203, 223, 271, 323, 473, -2029),
    (5, 41): (21, -31, -39),
    (5, 43): (9, 151),
    (5, 49): (1,),
    (7, 1): (1,),
    (7, 3): (-1, -43),
    (7, 5): (-1, 3, 27),
    (7, 9): (1, -89, -145),
    (7, 11): (-3, 23),
    (7, 15): (11,),
    (7, 17): (-9, -11),
    (7, 19): (5,),
    (7, 23): (1,),
    (7, 25): (1,),
    (7, 27): (-11,),
    (7, 29): (-31,),
    (9, 1): (-1,),
    (15, 1): (1,),
    (17, 1): (-1,),
    (31, 1): (1,),
    (33, 1): (-1,),
    (63, 1): (1,),
    (65, 1): (-1,),
    (127, 1): (1,),
    (129, 1): (-1,),
    (181, 1): (27, 35),
}


def was_searched(map: Map) -> bool:
    """Whether the map lies where PRIMITIVE was made, so that a cycle outside of it is news. c with a factor of q have no
    primitive cycles, and are searched through their divisors."""
    q, c = map.q, abs(map.c)
    while (common := gcd(q, c)) > 1:
        c //= common
    return (q == 3 and c < 100) or (q == 5 and c < 50) or (q == 7 and c < 30) or (9 <= q < 200 and c == 1) or (q == c == 1)


def known(map: Map) -> frozenset[int]:
    """The representatives of all known cycles of a map. For a map that nobody has searched: 0 and multiples of others' only."""
    size, sign = abs(map.c), 1 if map.c > 0 else -1
    found = {0}
    for (q, c), cycles in PRIMITIVE.items():
        if q == map.q and size % c == 0:
            found |= {sign * size // c * n for n in cycles}
    return frozenset(found)


def recomputed(q: int, c: int, largest: int | None = None, length: int | None = None, path: str = "auto") -> tuple[int, ...]:
    """A row of PRIMITIVE from scratch; with smaller bounds, the part of it that they reach."""
    map = Map(q, c)
    largest = largest or (10**6 if q == 3 else 10**5)
    followed = examine(map, -largest, largest + 1, path=path)
    assert followed is not None
    algebra = algebraic_cycles(map, length or (22 if q == 3 else 20), path)
    found = {*followed.cycles, *(cycle.representative for cycle in algebra)}
    return tuple(sorted((n for n in found if n and gcd(n, c) == 1), key=lambda n: (abs(n), n < 0)))


@dataclass(frozen=True)
class Discovery:
    """A cycle that is not known, or a number that was followed to a limit and neither came down nor repeated."""

    map: Map
    number: int  # where it was met
    cycle: Cycle | None  # None: it does not come down
    steps: int = 0  # shortcut steps that it was followed for, without a cycle
    bits: int = 0  # the size at which it was given up, without a cycle

    def __str__(self) -> str:
        if self.cycle is None:
            return (f"under {self.map} the number {self.number} has not come below itself, and not repeated, within {self.steps:,} "
                    f"shortcut steps or {self.bits:,} bits (checked in exact integers)")  # fmt: skip
        return (f"a cycle of {self.map} that is not known: {self.cycle.representative}, {self.cycle.standard_steps:,} members "
                f"({self.cycle.shortcut_steps:,} shortcut steps, {self.cycle.odd_steps:,} odd), met from "
                f"{spelled(self.number)} (checked in exact integers)")  # fmt: skip

    def as_dict(self) -> dict[str, object]:
        """For JSON; numbers of the trajectories as decimal strings."""
        kind: dict[str, object] = {"kind": "cycle", "cycle": self.cycle.as_dict()} if self.cycle is not None else {
            "kind": "does not come down", "steps": self.steps, "bits": self.bits}  # fmt: skip
        return {"map": str(self.map), "number": str(self.number), **kind, "text": str(self)}

    @staticmethod
    def from_dict(given: dict[str, Any]) -> Discovery:
        """The inverse of as_dict."""
        map, number, cycle = Map.parse(given["map"]), int(given["number"]), given.get("cycle")
        if cycle is None:
            return Discovery(map, number, None, given["steps"], given["bits"])
        return Discovery(map, number, Cycle(map, int(cycle["representative"]), cycle["shortcut_steps"], cycle["odd_steps"]))


def discovery(map: Map, n: int, limits: Limits, cycles: frozenset[int] | None = None) -> Discovery | None:
    """What n stands for, worked out again from nothing in exact integers: None where it comes below itself or runs into a
    cycle of `cycles` (default: the known ones).

    Under q >= 5 nearly every odd number grows beyond any limit, so there only cycles are news.
    """
    outcome, x, _, _ = follow(n, map, limits)
    if outcome == UNRESOLVED and map.q < 5:
        return Discovery(map, n, None, limits.steps, limits.bits)
    if outcome != CYCLE:
        return None
    cycle = cycle_through(map, x)
    assert cycle is not None and cycle.holds()
    return None if cycle.representative in (known(map) if cycles is None else cycles) else Discovery(map, n, cycle)
