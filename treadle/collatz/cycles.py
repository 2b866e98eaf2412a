"""Cycles of a map q x + c, and the exhaustive search for all of at most N shortcut steps, by algebra.

A cycle is fixed by its parities: with odd ones at places a_0 < ... < a_(K-1) of N, the number that they begin at satisfies

    n (2^N - q^K) = c (q^(K-1) 2^a_0 + q^(K-2) 2^a_1 + ... + 2^a_(K-1))                                    (Lagarias 1985, 2.7)

so it is enough to try each word of parities up to rotation and repetition: Lyndon words (Duval 1988 lists them), about 2^N / N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from treadle.collatz.arithmetic import Map
from treadle.collatz.compiled import load, resolved
from treadle.errors import ConfigError

LONGEST = 48  # 5.9e12 words: three days at 25 million a second, the compiled loop's rate
DEFAULT_LENGTH = 18
WORDS = 1 << 22  # in one call of the compiled loop, about .2 s
ROOM = 1 << 12  # words that one call may hand back


@dataclass(frozen=True, order=True)
class Cycle:
    """A cycle by the member of least absolute value and its numbers of steps. Its members have one sign: what has c's keeps it."""

    map: Map
    representative: int
    shortcut_steps: int
    odd_steps: int

    @property
    def standard_steps(self) -> int:
        """Members under n -> n / 2, q n + c."""
        return self.shortcut_steps + self.odd_steps

    def members(self) -> Iterator[int]:
        """The members under the shortcut map, from the representative on."""
        n = self.representative
        for _ in range(self.shortcut_steps):
            yield n
            n = self.map.shortcut(n)

    def holds(self) -> bool:
        """Checks it in exact integers twice: by following it round once, and by the equation that its parities must satisfy."""
        members = list(self.members())
        least = min(members, key=abs)
        once = len(set(members)) == len(members) and self.map.shortcut(members[-1]) == members[0] == least
        odd = [place for place, n in enumerate(members) if n & 1]
        q, c, count = self.map.q, self.map.c, len(odd)
        sums = sum(q ** (count - 1 - j) << place for j, place in enumerate(odd))
        equation = self.representative * ((1 << self.shortcut_steps) - q**count) == c * sums
        return once and equation and count == self.odd_steps

    def as_dict(self) -> dict[str, object]:
        """For JSON; the number as a decimal string."""
        return {"map": str(self.map), "representative": str(self.representative), "shortcut_steps": self.shortcut_steps,
                "odd_steps": self.odd_steps, "standard_steps": self.standard_steps}  # fmt: skip


def cycle_through(map: Map, n: int, most: int = 10_000_000) -> Cycle | None:
    """The cycle that n is a member of; None when the shortcut map does not bring n back within `most` steps."""
    least, odd, x = n, 0, n
    for steps in range(1, most + 1):
        odd += x & 1
        x = map.shortcut(x)
        if abs(x) < abs(least):
            least = x
        if x == n:
            return Cycle(map, least, steps, odd)
    return None


def lyndon_words(longest: int) -> Iterator[list[int]]:
    """Binary Lyndon words of at most this length, in lexicographic order (Duval 1988, Theor. Comput. Sci. 60). Each is valid
    until the next is asked for."""
    word = [-1]
    while word:
        word[-1] += 1
        yield word
        period = len(word)
        while len(word) < longest:
            word.append(word[-period])
        while word and word[-1] == 1:
            word.pop()


def start_of(word: list[int], map: Map) -> int | None:
    """The integer whose parities are `word`, over and over; None when no integer's are."""
    sums, odd = 0, 0
    for place, bit in enumerate(word):
        if bit:
            sums = map.q * sums + (1 << place)
            odd += 1
    n, rest = divmod(map.c * sums, (1 << len(word)) - map.q**odd)
    return None if rest else n


def algebraic_cycles(
    map: Map, length: int = DEFAULT_LENGTH, path: str = "auto", progress: Callable[[int], None] = lambda words: None
) -> list[Cycle]:
    """Every cycle of at most `length` shortcut steps, of positive and negative numbers and 0, by absolute value.

    path: auto, numba or python; progress is called now and then with the number of words tried so far.
    """
    if not 1 <= length <= LONGEST:
        raise ConfigError(f"cycles of 1 to {LONGEST} steps can be searched by algebra, not {length}; --range searches by following")
    found = []
    for word in _hits(map, length, progress) if resolved(path, PATHS, "the search by algebra") == "numba" else _all(length, progress):
        n = start_of(word, map)
        if n is not None:
            cycle = cycle_through(map, n, len(word))
            assert cycle is not None and cycle.shortcut_steps == len(word)
            found.append(cycle)
    return sorted(found, key=lambda cycle: (abs(cycle.representative), cycle.representative < 0))


PATHS = ("numba", "python")


def _all(length: int, progress: Callable[[int], None]) -> Iterator[list[int]]:
    for count, word in enumerate(lyndon_words(length)):
        if count % 100_000 == 0:
            progress(count)
        yield word


def _hits(map: Map, length: int, progress: Callable[[int], None]) -> Iterator[list[int]]:
    """The words that the compiled loop does not rule out.

    It knows n = c S / D modulo 2^64 only (D is odd); n is at most c S / |D| for the largest S of that many odd steps, so one
    that is larger as a signed number of 64 bits is no integer's.
    """
    loops = load("cycles_numba")
    assert loops is not None
    factor = np.zeros((length + 1, length + 1), dtype=np.uint64)  # c / D modulo 2^64, by steps and odd steps
    bound = np.zeros((length + 1, length + 1), dtype=np.int64)
    for steps in range(1, length + 1):
        for odd in range(steps + 1):
            denominator = (1 << steps) - map.q**odd  # never 0: odd for steps >= 1
            factor[steps, odd] = map.c * pow(denominator, -1, 1 << 64) % (1 << 64)
            largest = sum(map.q ** (odd - 1 - j) << (steps - odd + j) for j in range(odd))
            bound[steps, odd] = min(abs(map.c) * largest // abs(denominator), (1 << 63) - 1)
    word, state = np.zeros(length, dtype=np.int64), np.array([1, 0], dtype=np.int64)
    word[0] = -1
    found = np.zeros((ROOM, length + 1), dtype=np.int64)
    while state[0]:
        count = loops.words(word, state, length, np.uint64(map.q % (1 << 64)), factor, bound, WORDS, found)
        progress(int(state[1]))
        for row in found[:count].tolist():
            yield row[1 : 1 + row[0]]
