"""Which numbers of an interval come down, and what cycles the others run into: every n is followed, under any map q x + c.

A number is done when it comes below its own absolute value, so a whole interval around 0 is settled by induction: each of its
numbers reaches one of the cycles that are found, except those named as unresolved. What does not come down is followed by Brent's
algorithm (1980, BIT 20): one number is remembered, a later one after twice as many steps, and a cycle is there when it is met.

Negative n under q x + c move as -n under q x - c, so the compiled loop knows positive numbers only: up to 128 bits, and it
only says which came below themselves. Everything else is followed again in Python integers (`follow`), the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from treadle.collatz.arithmetic import Map
from treadle.collatz.compiled import load, resolved
from treadle.collatz.cycles import cycle_through
from treadle.errors import ConfigError

ALGORITHM = "brent-1"  # of following and of the sums; a new one whenever any total could change
PATHS = ("numba", "python")
MOST_STEPS = 100_000
OVERFLOW = 1 << 128
LISTED = 1000  # numbers that are named of those unresolved (under q >= 5 nearly all odd ones are) or of more than 128 bits
LARGEST = 1 << 10_000  # absolute value of a number; 3,010 digits, where Python writes at most 4,300
MOST_FACTOR = (1 << 31) - 1  # of the compiled loop
BELOW, CYCLE, UNRESOLVED = "below", "cycle", "unresolved"


@dataclass(frozen=True)
class Limits:
    """When a number that has neither come down nor repeated is given up, and reported: no claim is made about it."""

    steps: int = MOST_STEPS
    bits: int = 512

    @staticmethod
    def of(map: Map, largest: int) -> Limits:
        """For numbers up to `largest`. Under q >= 5 random numbers grow, so most never come back and are given up early."""
        bits = largest.bit_length()
        return Limits(bits=max(120, bits + 50) if map.q >= 5 else max(512, 4 * bits))


@dataclass(frozen=True)
class Totals:
    """What became of the numbers of an interval, the same on every path."""

    numbers: int = 0
    odd_steps: int = 0  # of the numbers that came below themselves, until they did
    maximum: int = 0  # the largest absolute value met by them on the way there, standard steps
    argmax: int = 0  # the first number that meets it, by absolute value, positive before negative
    cycles: tuple[int, ...] = ()  # representatives, by absolute value
    into_cycles: int = 0  # numbers that run into a cycle without coming below themselves
    overflow_count: int = 0  # numbers that meet one of more than 128 bits
    overflow: tuple[int, ...] = ()  # the first of them
    unresolved_count: int = 0
    unresolved: tuple[int, ...] = ()  # the first of them

    def merge(self, other: Totals) -> Totals:
        """Of two disjoint sets of numbers; the order does not matter."""
        maximum = max(self.maximum, other.maximum)
        return Totals(
            self.numbers + other.numbers,
            self.odd_steps + other.odd_steps,
            maximum,
            min((each.argmax for each in (self, other) if each.maximum == maximum), key=_place),
            tuple(sorted({*self.cycles, *other.cycles}, key=_place)),
            self.into_cycles + other.into_cycles,
            self.overflow_count + other.overflow_count,
            _first(self.overflow + other.overflow),
            self.unresolved_count + other.unresolved_count,
            _first(self.unresolved + other.unresolved),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: counts as integers, numbers of the trajectories as decimal strings."""
        return {
            "numbers": self.numbers, "odd_steps": self.odd_steps, "maximum": str(self.maximum), "argmax": str(self.argmax),
            "cycles": [str(n) for n in self.cycles], "into_cycles": self.into_cycles,
            "overflow_count": self.overflow_count, "overflow": [str(n) for n in self.overflow], "unresolved_count": self.unresolved_count,
            "unresolved": [str(n) for n in self.unresolved],
        }  # fmt: skip


def _place(n: int) -> tuple[int, bool]:
    return abs(n), n < 0


def _first(numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers), key=_place)[:LISTED])


def follow(n: int, map: Map, limits: Limits) -> tuple[str, int, int, int]:
    """The exact reference: (BELOW, CYCLE or UNRESOLVED; where it was then; odd steps; the largest absolute value met)."""
    start, q, c = abs(n), map.q, map.c
    x = remembered = n
    most, odd, since, power = start, 0, 0, 1
    for _ in range(limits.steps):
        if x & 1:
            x = q * x + c
            odd += 1
            most = max(most, abs(x))
        x >>= 1
        if abs(x) < start:
            return BELOW, x, odd, most
        if x == remembered:
            return CYCLE, x, odd, most
        if x.bit_length() > limits.bits:
            return UNRESOLVED, x, odd, most
        since += 1
        if since == power:
            remembered, power, since = x, 2 * power, 0
    return UNRESOLVED, x, odd, most


def examine_one(n: int, map: Map, limits: Limits) -> Totals:
    """The Totals of one number."""
    outcome, x, odd, most = follow(n, map, limits)
    overflow = (n,) if most >= OVERFLOW else ()
    found = Totals(1, overflow_count=len(overflow), overflow=overflow)
    if outcome == BELOW:
        return replace(found, odd_steps=odd, maximum=most, argmax=n)
    if outcome == UNRESOLVED:
        return replace(found, unresolved_count=1, unresolved=(n,))
    cycle = cycle_through(map, x)
    assert cycle is not None  # x has been met twice
    return replace(found, cycles=(cycle.representative,), into_cycles=1)


def examine(map: Map, start: int, end: int, limits: Limits | None = None, path: str = "auto", threads: int = 1,
            stopping: Callable[[], bool] = lambda: False) -> Totals | None:  # fmt: skip
    """Every n in [start, end), of either sign. path: auto, numba or python. None when `stopping` said so in between."""
    limits = limits or Limits.of(map, max(abs(start), abs(end)))
    path = resolved(path, PATHS, "the search by following")
    if start > end or max(abs(start), abs(end)) > LARGEST:
        raise ConfigError("an interval A:B has A <= B, both of at most 2^10000")
    found = Totals()
    signs = []
    if start < 0:
        signs.append((Map(map.q, -map.c), -min(end - 1, -1), -start + 1, -1))
    if end > 0:
        signs.append((map, max(start, 0), end, 1))
    for mirrored, low, high, sign in signs:
        if path == "numba" and max(mirrored.q, abs(mirrored.c)) <= MOST_FACTOR:
            parts = [low + (high - low) * part // threads for part in range(threads + 1)]

            def run(part: int, mirrored: Map = mirrored, sign: int = sign, parts: list[int] = parts) -> Totals | None:
                return _compiled(mirrored, parts[part], parts[part + 1], sign, limits, stopping)

            if threads == 1:
                results: list[Totals | None] = [run(0)]
            else:
                with ThreadPoolExecutor(threads) as pool:
                    results = list(pool.map(run, range(threads)))
        else:
            results = [_plain(map, sign, low, high, limits, stopping)]
        for part in results:
            if part is None:
                return None
            found = found.merge(part)
    return found


def _plain(map: Map, sign: int, low: int, high: int, limits: Limits, stopping: Callable[[], bool]) -> Totals | None:
    found = Totals()
    for place, magnitude in enumerate(range(low, high)):
        if place % 256 == 0 and stopping():
            return None
        found = found.merge(examine_one(sign * magnitude, map, limits))
    return found


SLICE = 1 << 18  # numbers in one call of the compiled loop, some milliseconds
ROOM = 1 << 12  # numbers that one call may hand back for following in integers
LOOP_BITS = 126  # what the compiled loop can hold, with room for a step


def _compiled(map: Map, low: int, high: int, sign: int, limits: Limits, stopping: Callable[[], bool]) -> Totals | None:
    """Magnitudes [low, high) of one sign; `map` is the one under which they move as positive numbers."""
    loops = load("cycle_search_numba")
    assert loops is not None
    actual = map if sign > 0 else Map(map.q, -map.c)
    found, again = Totals(), np.empty(ROOM, dtype=np.int64)
    unresolved = np.empty(LISTED, dtype=np.int64)
    short = limits.bits if limits.bits <= LOOP_BITS else 0  # then the loop itself may give up, exactly where `follow` does
    while low < high:
        if stopping():
            return None
        size = min(SLICE, high - low)
        if (low + size).bit_length() > LOOP_BITS:
            return _later(_plain(actual, sign, low, high, limits, stopping), found)
        done, replays, odd, lost, most_low, most_high, argmax = loops.below(
            np.uint64(low & 0xFFFFFFFFFFFFFFFF), np.uint64(low >> 64), size, np.uint64(map.q), np.uint64(abs(map.c)),
            map.c < 0, limits.steps, short, again, unresolved,
        )  # fmt: skip
        part = Totals(int(done) - int(replays) - int(lost), int(odd), int(most_low) | int(most_high) << 64, sign * (low + int(argmax)))
        found = found.merge(part if part.maximum else Totals(part.numbers, part.odd_steps))
        if lost:
            named = _first(tuple(sign * (low + offset) for offset in unresolved[: min(int(lost), LISTED)].tolist()))
            found = found.merge(Totals(int(lost), unresolved_count=int(lost), unresolved=named))
        for place, offset in enumerate(again[: int(replays)].tolist()):
            if place % 256 == 255 and stopping():
                return None
            found = found.merge(examine_one(sign * (low + offset), actual, limits))
        low += int(done)
    return found


def _later(part: Totals | None, found: Totals) -> Totals | None:
    return None if part is None else found.merge(part)


def chunks(map: Map, start: int, end: int | None, path: str = "auto") -> Iterator[tuple[int, int]]:
    """[start, end), or without end, in pieces of about a second of one thread."""
    while end is None or start < end:
        size = chunk_size(map, start, path)
        stop = (start // size + 1) * size
        stop = stop if end is None else min(stop, end)
        yield start, stop
        start = stop


def settle(map: Map, start: int, end: int, path: str = "auto", stopping: Callable[[], bool] = lambda: False,
           progress: Callable[[int], None] = lambda reached: None) -> Totals | None:  # fmt: skip
    """`examine` for a long interval: progress hears of each piece of about a second."""
    found, limits = Totals(), Limits.of(map, max(abs(start), abs(end)))
    for low, high in chunks(map, start, end, path):
        part = examine(map, low, high, limits, path, 1, stopping)
        if part is None:
            return None
        found = found.merge(part)
        progress(high)
    return found


def chunk_size(map: Map, start: int, path: str = "auto") -> int:
    """Numbers near `start` that are followed in about a second: compiled, 3x + 1 takes 12 ns a number and 5x + 1, of whose odd
    numbers nearly all are followed until they are given up, 600 ns; in integers 5 us and 80 us."""
    compiled = resolved(path, PATHS, "the search by following") == "numba" and max(map.q, abs(map.c)) <= MOST_FACTOR
    if map.q >= 5:
        return 1 << (20 if compiled and Limits.of(map, abs(start)).bits <= LOOP_BITS else 13)
    return 1 << (26 if compiled and abs(start) < 1 << 100 else 17)
