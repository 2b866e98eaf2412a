"""Records of the 3x + 1 map: numbers whose delay (OEIS A006877, A006878) or maximum (A006884, A006885) exceeds that of all
smaller numbers.

Numbers from BASE on are sieved by their residue modulo 2^16. n = r + a 2^16 moves to T^16(n) = T^16(r) + 3^f a (Terras 1976), so

- of residues with the same T^16(r) and f only the smallest can hold a delay record: the others are equal to a smaller number's;
- n = 3m + 2 comes after 2m + 1, and n = 9m + 4 after 8m + 3, so those are at least as good;
- an even delay record 2m has delay(m) + 1, so m holds a record itself; an even maximum record needs n > maximum(m), n <= 2;
- once the record R exceeds all that 16 steps can reach, 2 (3/2)^16 (n + 1), a residue whose members come below themselves within
  them, or meet a smaller one as above, has no maximum record.

A delay is cut off when what is left cannot make a record: after s steps at x, below the first number with a delay of more than
record - s. A maximum is cut off when x < n. All paths give the same records; tests compare them with a search without a sieve.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from treadle.collatz.arithmetic import delay, maximum
from treadle.collatz.compiled import load, resolved
from treadle.errors import ConfigError

BITS = 16
BASE = 1 << 17  # below it every number is followed
LARGEST = 1 << 53
KINDS = {"delay": delay, "path": maximum}
PATHS = ("numba", "numpy", "python")
JUMP = 12
U = np.uint64


@dataclass(frozen=True, order=True)
class Record:
    """A number and its delay (standard steps to 1) or maximum."""

    number: int
    value: int


@dataclass(frozen=True)
class Sieve:
    """Residues r modulo 2^16 that can hold a record, with T^16(r) and f: nine lists one after the other, for a mod 9."""

    begins: np.ndarray  # int64 [10]
    residues: np.ndarray
    images: np.ndarray
    odd_steps: np.ndarray

    def block(self, a: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = slice(*self.begins[a % 9 : a % 9 + 2].tolist())
        return self.residues[part], self.images[part], self.odd_steps[part]


class RecordSearch:
    """Records in ascending order, in pieces: `advance` as far as wanted, `records` what was found so far."""

    def __init__(self, kind: str = "delay", path: str = "auto") -> None:
        if kind not in KINDS:
            raise ConfigError(f"no kind of record {kind!r}; there are {', '.join(KINDS)}")
        self.kind = kind
        self.path = resolved(path, PATHS, "the search for records")
        self.reached = 1
        self.records: list[Record] = []

    def resume(self, reached: int, records: Iterable[Record]) -> None:
        """Goes on from what an earlier search has found below `reached`; its records are worked out again."""
        for record in records:
            if KINDS[self.kind](record.number) != record.value or not self.best < record.value:
                raise ConfigError(f"{record.number} is no {self.kind} record of {record.value}; search again without this log")
            self.records.append(record)
        self.reached = reached

    @property
    def best(self) -> int:
        return self.records[-1].value if self.records else -1

    def advance(self, end: int) -> list[Record]:
        """Searches [reached, end) and returns what it adds."""
        check_limit(end)
        before = len(self.records)
        if self.reached < min(end, BASE):
            values = _base(self.kind)
            for n in range(self.reached, min(end, BASE)):
                if values[n] > self.best:
                    self.records.append(Record(n, values[n]))
            self.reached = min(end, BASE)
        if self.reached < end:
            self._offer(self._candidates(end), end)
            self.reached = end
        return self.records[before:]

    def _offer(self, found: list[tuple[int, int]], end: int) -> None:
        if self.kind == "delay":
            found += [(2 * record.number, record.value + 1) for record in self.records if self.reached <= 2 * record.number < end]
        heapq.heapify(found)
        while found:
            n, value = heapq.heappop(found)
            if value > self.best:
                self.records.append(Record(n, value))
                if self.kind == "delay" and 2 * n < end:
                    heapq.heappush(found, (2 * n, value + 1))

    def _candidates(self, end: int) -> list[tuple[int, int]]:
        """Odd numbers in [reached, end), with their values, among which all odd records are."""
        sieve = _sieve(self.kind == "path" and self.best > growth(BITS) * (end + 1))
        blocks = self.reached >> BITS, (end - 1 >> BITS) + 1
        found, again = {"numba": _compiled, "numpy": _vectorised, "python": _plain}[self.path](self, sieve, *blocks)
        exactly = KINDS[self.kind]
        found += [(n, exactly(n)) for n in again if self.reached <= n < end]
        return [(n, value) for n, value in found if self.reached <= n < end and value > self.best]

    def bounds(self) -> np.ndarray:
        """By steps s taken so far: numbers below bounds[s] have no delay of more than best - s."""
        found, place = np.ones(self.best + 1, dtype=U), 0
        for s in range(self.best, 0, -1):
            while self.records[place].value <= self.best - s:
                place += 1
            found[s] = self.records[place].number
        return found


def check_limit(below: int) -> None:
    if not 1 <= below <= LARGEST:
        raise ConfigError(f"records are searched below 1 to 2^{LARGEST.bit_length() - 1}, as in --below 10^8; that one would take years")


def growth(steps: int) -> int:
    """So many shortcut steps from x meet nothing larger than this times (x + 1), standard steps: 3 y + 1 < 3 (y + 1), and y + 1
    grows by 3/2 at most."""
    return 2 * 3**steps // 2**steps + 1


def records(below: int, kind: str = "delay", path: str = "auto") -> list[Record]:
    """All delay or path records n < below. kind: delay or path; path: auto, numba, numpy or python."""
    search = RecordSearch(kind, path)
    advance_in_pieces(search, below)
    return search.records


def advance_in_pieces(search: RecordSearch, below: int, seen: Callable[[list[Record]], bool] = lambda new: False) -> bool:
    """To `below`, in pieces of about a second; `seen` gets the records of each and stops the search by returning True.
    Whether it came to the end."""
    check_limit(below)
    size = 1 << {"numba": 28, "numpy": 20, "python": 17}[search.path]
    while search.reached < below:
        # Early pieces are small: what is cut off depends on the records before the piece.
        if seen(search.advance(min(below, search.reached + min(size, max(BASE, search.reached))))):
            return search.reached >= below
    return True


@functools.cache
def _base(kind: str) -> list[int]:
    """Delay or maximum of each n < BASE, from those of the smaller numbers that they come to."""
    values = [0] * BASE
    for n in range(1, BASE):
        x, steps, most = n, 0, n
        while x >= n > 1:
            if x & 1:
                x = 3 * x + 1
                steps += 1
                most = max(most, x)
            x >>= 1
            steps += 1
        values[n] = (steps + values[x] if n > 1 else 0) if kind == "delay" else max(most, values[x] if n > 1 else 1)
    values[0] = -1
    return values


@functools.cache
def _sieve(descending: bool) -> Sieve:
    """descending: residues whose members come below themselves within 16 steps are left out as well."""
    residues = np.arange(1 << BITS, dtype=np.int64)
    x, f, down = residues.copy(), np.zeros_like(residues), np.zeros(1 << BITS, dtype=bool)
    for step in range(1, BITS + 1):
        odd = x & 1
        x = np.where(odd == 1, (3 * x + 1) >> 1, x >> 1)
        f += odd
        slope = 3**f << (BITS - step)  # T^step(r + a 2^16) = x + slope a
        down |= (slope < 1 << BITS) & (x + slope < residues + (1 << BITS))  # at a = 1, hence at every larger a
    _, first = np.unique(x << 8 | f, return_index=True)  # np.unique returns the first, smallest one of each
    stays = np.zeros(1 << BITS, dtype=bool)
    stays[first] = True
    stays &= residues % 2 == 1
    if descending:
        stays &= ~down
    lists = []
    for ninth in range(9):
        n = residues + (ninth << BITS)
        lists.append(residues[stays & (n % 3 != 2) & (n % 9 != 4)])
    kept = np.concatenate(lists)
    return Sieve(np.cumsum([0, *map(len, lists)]), kept.astype(U), x[kept].astype(U), f[kept])


Found = tuple[list[tuple[int, int]], list[int]]  # numbers with their values, and numbers to be followed in integers


def _plain(search: RecordSearch, sieve: Sieve, first: int, end: int) -> Found:
    found: list[tuple[int, int]] = []
    bounds, best = search.bounds().tolist() if search.kind == "delay" else [], search.best
    for a in range(first, end):
        for r, image, f in zip(*(column.tolist() for column in sieve.block(a))):
            n, x, steps, most = r + (a << BITS), image + 3**f * a, BITS + f, 0
            if search.kind == "path":
                x = n
                while x >= n:
                    if x & 1:
                        x = 3 * x + 1
                        most = max(most, x)
                    x >>= 1
            else:
                while x != 1 and (steps > best or x >= bounds[steps]):
                    x, steps = ((3 * x + 1) >> 1, steps + 2) if x & 1 else (x >> 1, steps + 1)
                most = steps if x == 1 else -1
            if most > best:
                found.append((n, most))
    return found, []


def _vectorised(search: RecordSearch, sieve: Sieve, first: int, end: int) -> Found:
    """A block at a time, each number until it is cut off."""
    found: list[tuple[int, int]] = []
    again: list[int] = []
    one, largest = U(1), U((2**64 - 2) // 3)
    best, delays = search.best, search.kind == "delay"
    bounds = search.bounds() if delays else np.empty(0, dtype=U)
    for a in range(first, end):
        residues, images, odd_steps = sieve.block(a)
        n = residues + U(a << BITS)
        x = images + U(3) ** odd_steps.astype(U) * U(a) if delays else n.copy()
        value = BITS + odd_steps if delays else np.zeros(len(n), dtype=U)
        while len(n):
            odd = x & one == one
            large = odd & (x > largest)
            if large.any():
                again += n[large].tolist()
                n, x, value, odd = n[~large], x[~large], value[~large], odd[~large]
            raised = np.where(odd, x * U(3) + one, x)
            x = raised >> one
            value = value + 1 + odd if delays else np.maximum(value, raised * odd)
            if delays:
                done = (x == one) | ((value <= best) & (x < bounds[np.minimum(value, best)]))
                hits = done & (x == one) & (value > best)
            else:
                done = x < n
                hits = done & (value > U(best)) if best < 2**64 else done & False
            if hits.any():
                found += zip(n[hits].tolist(), value[hits].tolist())
            n, x, value = n[~done], x[~done], value[~done]
    return found, again


@functools.cache
def _jumps() -> tuple[np.ndarray, np.ndarray]:
    """T^12(r) and f for r < 2^12."""
    x = np.arange(1 << JUMP, dtype=np.int64)
    f = np.zeros_like(x)
    for _ in range(JUMP):
        odd = x & 1
        x = np.where(odd == 1, (3 * x + 1) >> 1, x >> 1)
        f += odd
    return x.astype(U), f


def _compiled(search: RecordSearch, sieve: Sieve, first: int, end: int) -> Found:
    loops = load("records_numba")
    assert loops is not None
    found: list[tuple[int, int]] = []
    again: list[int] = []
    tables = sieve.begins, sieve.residues, sieve.images, sieve.odd_steps, np.array([3**f for f in range(BITS + 1)], dtype=U), *_jumps()
    numbers, values, replay = (np.zeros(1 << BITS, dtype=U) for _ in range(3))  # a block has 6,000 numbers at most
    while first < end:
        if search.kind == "delay":
            small = np.array(_base("delay")[: 1 << JUMP], dtype=np.int64)
            first, hits, replays = loops.delays(first, end, search.best, search.bounds(), small, *tables, numbers, values, replay)
        else:
            best = U(min(search.best, 2**64 - 1))  # what exceeds 64 bits is followed in integers anyway
            first, hits, replays = loops.maxima(first, end, best, U(growth(JUMP)), *tables, numbers, values, replay)
        found += zip(numbers[:hits].tolist(), values[:hits].tolist())
        again += replay[:replays].tolist()
    return found, again
