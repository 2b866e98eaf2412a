"""Proving an interval [start, end): split into aligned blocks, what is missing computed, every finished unit written down.

The certificate is the only state. A start after any end, kill -9 included, reads it and does what it lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.collatz import blocks, ledger, sieve, workers
from treadle.collatz.arithmetic import spelled
from treadle.collatz.blocks import Totals
from treadle.collatz.certificates import Log, Numbers, Piece, Reading, UnitRecord, block_units
from treadle.collatz.ledger import Interval, Ledger
from treadle.collatz.workers import Done, Work, worker_count
from treadle.errors import ConfigError, DataError, TreadleError

USUAL_BITS, MOST_BITS = 36, 40
MOST_LISTED = 1 << 21  # by this bound, of which the sieve leaves about half
VERIFIED = 1 << 71  # below it every number is known to reach 1 (Barina, J. Supercomput. 2025)


class NotDown(TreadleError):
    """A number did not come down: a possible counterexample. It is in the certificate."""

    exit_code = 3


@dataclass(frozen=True)
class Progress:
    """Where a verification stands. Numbers are those of the interval; seconds are since its start."""

    total: int
    done: int
    before: int  # done by earlier runs
    seconds: float

    @property
    def rate(self) -> float:
        """Numbers proved a second."""
        return (self.done - self.before) / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds, or None where nothing is known."""
        return (self.total - self.done) / self.rate if self.done > self.before else None


@dataclass(frozen=True)
class Result:
    """What is proved of an interval, and how it came about."""

    start: int
    end: int
    holes: tuple[Interval, ...]
    totals: Totals  # of the blocks that lie in the interval; of blocks that stick out as a whole
    blocks: int
    unresolved: tuple[int, ...]
    digest: str  # SHA-256 of the mathematical content: equal however the work was shared or interrupted
    certificate: str
    workers: int
    path: str
    progress: Progress
    damaged: int  # lines that were not sound, whose work was done again

    @property
    def proved(self) -> int:
        """How many numbers of [start, end) are proved to come below themselves."""
        return self.end - self.start - sum(high - low for low, high in self.holes)

    @property
    def complete(self) -> bool:
        return not self.holes and not self.unresolved

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers of the interval and of trajectories as decimal strings."""
        return {
            "start": str(self.start), "end": str(self.end), "count": str(self.end - self.start), "proved": str(self.proved),
            "complete": self.complete, "holes": [[str(low), str(high)] for low, high in self.holes],
            "unresolved": [str(n) for n in self.unresolved], "blocks": self.blocks, "algorithm": blocks.ALGORITHM,
            **{name: value for name, value in self.totals.as_dict().items() if name != "unresolved"},
            "digest": self.digest, "certificate": self.certificate, "seconds": round(self.progress.seconds, 3),
            "numbers_per_second": round(self.progress.rate), "proved_before": str(self.progress.before),
            "workers": self.workers, "path": self.path, "damaged_lines": self.damaged,
        }  # fmt: skip


def interval(start: int, end: int | None, count: int | None) -> Interval:
    """[start, end) from an end or a count; ConfigError for what is no interval of positive integers."""
    if (end is None) == (count is None):
        raise ConfigError("say where it ends, once: treadle collatz verify 2^68 2^68+2^36, or 2^68 --count 2^36")
    if count is not None and count < 1:
        raise ConfigError(f"--count {count}: at least 1 number, as in --count 2^36")
    last = start + count if count is not None else end
    assert last is not None
    if start < 1:
        raise ConfigError(f"an interval of positive integers begins at 1 or later, not at {start}")
    if last <= start:
        raise ConfigError(f"the end {spelled(last)} is not above the start {spelled(start)}; a number of numbers is written with --count, "
                          "as in --count 2^36")  # fmt: skip
    if last > blocks.LARGEST_NUMBER:
        raise ConfigError("only numbers below 2^1000 can be verified")
    # Of n, about one in x climbs above x n (Lagarias and Weiss 1992), and each that leaves 128 bits is listed by itself.
    most = max(MOST_LISTED * blocks.OVERFLOW // last, 1 << 26)
    if last - start > most:
        raise ConfigError(f"below {spelled(last)} too many of {spelled(last - start)} numbers leave 128 bits on their way to be listed "
                          f"one by one; verify at most 2^{most.bit_length() - 1} at a time")  # fmt: skip
    return start, last


def default_bits(count: int) -> int:
    """Blocks of 2^36 numbers, and from 2^40 numbers on larger ones up to 2^40, so that the certificate stays small."""
    return max(USUAL_BITS, min(MOST_BITS, count.bit_length() - 5))


def checked_bits(bits: int | None, count: int) -> int:
    if bits is None:
        return default_bits(count)
    if not blocks.SMALLEST_BITS <= bits <= blocks.LARGEST_BITS:
        raise ConfigError(f"--bits {bits}: a block has 2^{blocks.SMALLEST_BITS} to 2^{blocks.LARGEST_BITS} numbers; 36 is usual")
    return bits


def split(start: int, end: int, bits: int) -> Iterator[tuple[int, int] | Numbers]:
    """[start, end) as aligned blocks (high, t) with t <= bits, each as large as fits, and numbers one by one where not even
    2^8 fit."""
    smallest, at = 1 << blocks.SMALLEST_BITS, start
    while at < end:
        if at % smallest or end - at < smallest:
            stop = min(end, (at // smallest + 1) * smallest)
            yield Numbers(at, stop - at)
            at = stop
        else:
            size = _largest(at, end, bits)
            yield at >> size, size
            at += 1 << size


def _largest(at: int, end: int, bits: int) -> int:
    """The size t of the largest aligned block that begins at `at` and fits. Below sieve.FLOOR numbers are followed one by
    one in Python integers, so one block ends there."""
    return min(bits, (end - at).bit_length() - 1, ((at & -at) or sieve.FLOOR).bit_length() - 1)


def default_output(start: int, end: int) -> Path:
    """A name in the working folder that says the interval."""
    return Path(f"collatz-{_in_a_name(start)}-to-{_in_a_name(end)}.jsonl")


def _in_a_name(n: int) -> str:
    text = spelled(n).replace(",", "")
    return text if len(text) <= 60 else f"{text[:20]}_{len(text)}_digits_{text[-20:]}"


def verify(
    start: int,
    end: int,
    output: str | Path | None = None,
    *,
    bits: int | None = None,
    workers: int | str = "auto",
    path: str = "auto",
    cluster: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda at: None,
    say: Callable[[str], None] = lambda text: None,
    rules: str = "tree",
) -> Result:
    """Proves [start, end), or goes on with it, and returns what is proved by then.

    progress is called several times a second; say with what a reader of the certificate should know; stopping ends the
    work early. cluster: "ray" or an address, for work on several machines. rules: the sieve's, for tests of the audit.
    ConfigError, RunLocked or DataError where the arguments or the certificate do not allow it.
    """
    start, end = interval(start, end, None)
    bits, path = checked_bits(bits, end - start), blocks.resolved(path)
    count = worker_count(workers)
    with Log(output or default_output(start, end)) as log:
        known = Ledger([log.reading])
        _report(log.reading, known, say)
        run = _Run(log, known, start, end, bits, progress, say)
        todo = run.work()
        if cluster is None:
            found = _local(todo, path, count, stopping, rules)
        else:
            from treadle.collatz import cluster as several

            found = several.completed(todo, path, workers, cluster, stopping, say, rules)
        try:
            for done in found:
                if done is None:
                    log.sync_if_due()
                    progress(run.at())
                else:
                    run.take(done, path)
        finally:
            close = getattr(found, "close", None)
            if close is not None:
                close()
        progress(run.at())
        pieces = known.within(start, end)
        return Result(
            start, end, tuple(known.holes(start, end)), ledger.total(pieces), len(pieces),
            tuple(n for n in known.unresolved if start <= n < end), known.digest(start, end), str(log.path),
            count, path, run.at(), len(log.reading.damaged),
        )  # fmt: skip


def _local(work: Iterator[Work], path: str, count: int, stopping: Callable[[], bool], rules: str) -> Iterator[Done | None]:
    """Workers are started only when there is something to do."""
    first = next(work, None)
    if first is None:
        return iter(())

    def again() -> Iterator[Work]:
        yield first
        yield from work

    return workers.completed(again(), path, count, stopping, rules)


def _report(reading: Reading, known: Ledger, say: Callable[[str], None]) -> None:
    """What was wrong with a certificate that is gone on with; DataError where it contradicts itself."""
    if reading.torn:
        say(f"{reading.path}: its last line was cut off (the process was killed while it wrote); kept in {reading.path}.torn, "
            "its work is done again")  # fmt: skip
    for place, reason, _ in reading.unseen:
        say(f"{place} is damaged: {reason}; it is not trusted, its work is done again")
    if known.disagreements:
        said = "; ".join(str(overlap) for overlap in known.disagreements[:5])
        raise DataError(f"{reading.path} contradicts itself: {said}; one of the lines is wrong, so none of them can be trusted: "
                        "begin anew with another --output")  # fmt: skip
    others = [name for name in known.algorithms if name != blocks.ALGORITHM]
    if others:
        say(f"{reading.path}: finished blocks of the algorithm {', '.join(others)} are kept, this is {blocks.ALGORITHM}")


class _Run:
    """What is done of an interval while it is worked on."""

    def __init__(
        self, log: Log, known: Ledger, start: int, end: int, bits: int,
        progress: Callable[[Progress], None], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.log, self.known, self.start, self.end, self.bits = log, known, start, end, bits
        self.progress, self.say = progress, say
        for piece in list(known.pieces.values()):
            if not piece.place.path:  # all units were there, their block's line was not
                log.append(piece)
        # A block with a number that does not come down is known as well: it is reported, not done again.
        done = ledger.joined((piece.start, piece.end) for piece in known.pieces.values())
        # Of 0 nothing is said, so for [1, end) blocks begin there: [0, 2^t) is one, [1, 2^t) would be many.
        self.missing = ledger.remaining(done, 0 if start == 1 else start, end)
        self.done = end - start - sum(high - max(low, start) for low, high in self.missing)
        self.partial: dict[tuple[int, int], int] = {}  # finished units of a block in work
        for (begin, size, _, algorithm), units in known.units.items():
            if algorithm == blocks.ALGORITHM and (begin, size, False, algorithm) not in known.pieces:
                if any(low <= begin < high and 1 << _largest(begin, high, bits) == size for low, high in self.missing):
                    self.partial[begin, size] = len(units)
        self.before = self._numbers()
        self.began = time.monotonic()

    def work(self) -> Iterator[Work]:
        """What is missing, in ascending order of blocks."""
        for low, high in self.missing:
            for piece in split(low, high, self.bits):
                if isinstance(piece, Numbers):
                    yield piece
                    continue
                units = block_units(*piece)
                have = self.known.units.get((units[0].start, 1 << piece[1], False, blocks.ALGORITHM), {})
                yield from (unit for unit in units if unit.prefix not in have)

    def take(self, done: Done, path: str) -> None:
        """Writes finished work down, with its block when that is finished too."""
        work = done.work
        if isinstance(work, Numbers):
            self._finished(Piece(work.first, work.count, None, 0, {0: done.totals}, paths=("python",), seconds=done.seconds))
        elif work.prefix_bits == 0:  # the unit is the block
            parts = {0: done.totals}
            self._finished(Piece(work.start, work.size, work.bits, 0, parts, paths=(path,), seconds=done.seconds))
        else:
            record = UnitRecord(work, done.totals, path=path, seconds=done.seconds)
            self.log.append(record)
            key = (work.start, 1 << work.bits)
            self.partial[key] = self.partial.get(key, 0) + 1
            piece = self.known.add(record)
            if piece is not None:
                del self.partial[key], self.known.units[*key, False, blocks.ALGORITHM]
                self._finished(piece)
        for n in done.totals.unresolved:
            self.say(f"!!! {n} has not come below itself after {blocks.MOST_STEPS:,} steps: a possible counterexample, written to {self.log.path}")
        self.progress(self.at())

    def _finished(self, piece: Piece) -> None:
        self.log.append(piece)
        self.known.pieces[piece.key] = piece
        self.done += min(piece.end, self.end) - max(piece.start, self.start)

    def _numbers(self) -> int:
        """Of the interval, done: whole pieces, and of blocks in work their share of units."""
        share = 0
        for (begin, size), units in self.partial.items():
            inside = min(begin + size, self.end) - max(begin, self.start)
            if inside > 0:
                share += inside * units // len(block_units(begin // size, size.bit_length() - 1))
        return self.done + share

    def at(self) -> Progress:
        total = self.end - self.start
        return Progress(total, min(total, self._numbers()), self.before, time.monotonic() - self.began)
