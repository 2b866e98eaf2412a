"""The searcher: number after number upward from a start, or an interval, each seen to come down, to reach a known cycle, or to
be a discovery. It is made to run for weeks beside other work: at low priority, stopped at any time, going on from its log.

Under 3x + 1 positive numbers go through the verifier's sieve (blocks.py), which says "comes down" of whole classes; all other
maps, and negative numbers, are followed one by one (cycle_search.py). Either way a discovery is worked out again from nothing in
exact integers before anybody hears of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from treadle.collatz import blocks, cycle_search
from treadle.collatz.arithmetic import COLLATZ, Map, spelled
from treadle.collatz.certificates import Numbers, block_units
from treadle.collatz.compiled import resolved
from treadle.collatz.cycle_search import Limits
from treadle.collatz.known_cycles import Discovery, discovery
from treadle.collatz.ledger import joined, missing
from treadle.collatz.search_log import Reading, SearchLog, Tail
from treadle.collatz.verify import VERIFIED, split
from treadle.errors import ConfigError

# A block of the sieve is a line of the log. It begins small and grows or shrinks until it takes this many seconds, whatever share
# of the machine is left for it; its units, between which it may stop, take a hundredth of that.
BLOCK_BITS = {"numba": 32, "numpy": 20, "python": 16}
LEAST_BITS, MOST_BITS = 12, 40
BLOCK_SECONDS = 4.0, 16.0
# Of n, one in x climbs above x n, and the sieve's blocks list each that leaves 128 bits: at most some thousand in 2^28 numbers.
SIEVED_BELOW, LISTED_BITS = 1 << 110, 138
Interval = tuple[int, int]


@dataclass
class Result:
    """What a search has covered and found, with what its log held before."""

    map: Map
    start: int
    end: int | None
    covered: list[Interval] = field(default_factory=list)
    numbers: int = 0  # in this run
    seconds: float = 0.0
    maximum: int = 0
    argmax: int = 0
    cycles: set[int] = field(default_factory=set)
    unresolved: int = 0  # numbers that were given up
    discoveries: list[Discovery] = field(default_factory=list)  # of this run
    known_discoveries: list[Discovery] = field(default_factory=list)  # of earlier ones, from the log
    log: str | None = None

    @property
    def reached(self) -> int:
        """Everything from the start up to here is done."""
        return next(missing(self.covered, self.start, self.end), (self.end, None))[0] or 0

    @property
    def complete(self) -> bool:
        return self.end is not None and not list(missing(self.covered, self.start, self.end))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers of trajectories as decimal strings."""
        return {
            "map": str(self.map), "start": str(self.start), "end": None if self.end is None else str(self.end),
            "reached": str(self.reached), "complete": self.complete, "numbers": str(self.numbers), "seconds": round(self.seconds, 3),
            "maximum": str(self.maximum), "argmax": str(self.argmax), "cycles": [str(n) for n in _by_size(self.cycles)],
            "unresolved": self.unresolved, "discoveries": [found.as_dict() for found in self.discoveries],
            "earlier_discoveries": [found.as_dict() for found in self.known_discoveries], "log": self.log,
        }  # fmt: skip


def _by_size(numbers: set[int]) -> list[int]:
    return sorted(numbers, key=lambda n: (abs(n), n < 0))


def search(
    start: int = VERIFIED,
    end: int | None = None,
    map: Map = COLLATZ,
    log: str | Path | None = None,
    *,
    path: str = "auto",
    workers: int = 1,
    known: frozenset[int] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[Result], None] = lambda result: None,
    say: Callable[[str], None] = lambda text: None,
    on_discovery: Callable[[Discovery], None] = lambda found: None,
) -> Result:
    """Searches [start, end), or upward from start until `stopping`, leaving out what its log covers.

    known: representatives of cycles that are no news; default those of known_cycles.py. path: auto, numba, numpy (for 3x + 1)
    or python. workers: threads. on_discovery is called once for each discovery of this run, after it is in the log.
    ConfigError or RunLocked where the arguments or the log do not allow it.
    """
    if max(abs(start), abs(end or 0)) > cycle_search.LARGEST:
        raise ConfigError("numbers up to 2^10000 can be searched")
    if end is not None and end <= start:
        raise ConfigError(f"the end {spelled(end)} is not above the start {spelled(start)}; say how far with --count 2^30")
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1 thread")
    run = _Run(Result(map, start, end, log=None if log is None else str(log)), path, workers, known, stopping)
    writer = None if log is None else SearchLog(log, {"map": str(map)})
    try:
        if writer is not None:
            _report(writer, say)
            run.take_up(writer.reading)
        began = time.monotonic()
        for low, high in list(missing(run.result.covered, start, end)):
            for entry, found in run.pieces(low, high):
                for each in found:  # before the piece: were this killed in between, the piece would be done again
                    if writer is not None:
                        writer.append({"kind": "discovery", "discovery": each.as_dict()})
                    run.result.discoveries.append(each)
                    on_discovery(each)
                if writer is not None:
                    writer.append(entry)
                run.done(entry)
                run.result.seconds = time.monotonic() - began
                progress(run.result)
            if stopping():
                break
    finally:
        if writer is not None:
            writer.close()
    return run.result


def _report(log: SearchLog, say: Callable[[str], None]) -> None:
    if log.reading.torn:
        say(f"{log.path}: its last line was cut off (the process was killed while it wrote); that piece is done again")
    for line, reason in log.reading.damaged:
        say(f"{log.path} line {line} is damaged: {reason}; its piece is not trusted, and done where no other line covers it")


class _Run:
    """What is known while a search works."""

    def __init__(self, result: Result, path: str, workers: int, known: frozenset[int] | None, stopping: Callable[[], bool]) -> None:
        self.result, self.workers, self.known, self.stopping = result, workers, known, stopping
        self.map = result.map
        sieved = self.map == COLLATZ and 1 <= result.start and (result.end or 2 * result.start) <= SIEVED_BELOW
        if sieved:
            self.path = blocks.resolved(path)
        else:  # which has no arrays: what asks for them gets integers
            self.path = resolved("python" if path == "numpy" else path, cycle_search.PATHS, f"the search of {self.map}")
        self.sieved = sieved
        self.bits = BLOCK_BITS.get(self.path, 0)
        self.told: set[int] = set()

    def take_up(self, reading: Reading) -> None:
        """What an earlier run has done and found."""
        for entry in reading.entries:
            if entry["kind"] == "discovery":
                found = Discovery.from_dict(entry["discovery"])
                self.told.add(_what(found))
                self.result.known_discoveries.append(found)
            else:
                self._count(entry)
        self.result.covered = reading.covered()

    def done(self, entry: dict[str, Any]) -> None:
        start, end = int(entry["start"]), int(entry["end"])
        self.result.covered = joined([*self.result.covered, (start, end)])
        self.result.numbers += end - start
        self._count(entry)

    def _count(self, entry: dict[str, Any]) -> None:
        result = self.result
        maximum = int(entry.get("maximum", 0))
        if maximum > result.maximum:
            result.maximum, result.argmax = maximum, int(entry["argmax"])
        result.cycles.update(int(n) for n in entry.get("cycles", ()))
        result.unresolved += int(entry.get("unresolved_count", len(entry.get("unresolved", ()))))

    def pieces(self, low: int, high: int | None) -> Iterator[tuple[dict[str, Any], list[Discovery]]]:
        """[low, high) in finished pieces with their lines for the log; ends early when `stopping`."""
        if not self.sieved:
            yield from self._followed(low, high)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            while high is None or low < high:
                bits = min(self.bits, LISTED_BITS - low.bit_length())
                stop = ((low >> bits) + 1) << bits
                stop = stop if high is None else min(stop, high)
                for part in split(low, stop, bits):
                    if isinstance(part, Numbers):
                        yield from self._followed(part.first, part.first + part.count)
                        continue
                    piece = self._sieved(*part, pool)
                    if piece is None:
                        return
                    yield piece
                    if self.stopping():
                        return
                low = stop

    def _sieved(self, high: int, bits: int, pool: ThreadPoolExecutor) -> tuple[dict[str, Any], list[Discovery]] | None:
        """A block [high 2^bits, (high + 1) 2^bits) of 3x + 1."""
        began = time.monotonic()

        def compute(unit: blocks.Unit) -> blocks.Totals | None:
            return None if self.stopping() else blocks.run_unit(unit, self.path)

        units = block_units(high, bits)
        parts = list(pool.map(compute, units) if self.workers > 1 else map(compute, units))
        totals = blocks.Totals.total(part for part in parts if part is not None)
        if any(part is None for part in parts):
            return None
        found = self._judge(totals.unresolved, Limits.of(self.map, (high + 1) << bits))
        totals = replace(totals, unresolved=tuple(each.number for each in found))
        seconds = time.monotonic() - began
        if bits == self.bits:
            self.bits += (seconds < BLOCK_SECONDS[0] and bits < MOST_BITS) - (seconds > BLOCK_SECONDS[1] and bits > LEAST_BITS)
        start = high << bits
        return self._entry(start, start + (1 << bits), blocks.ALGORITHM, totals.as_dict(), began), found

    def _followed(self, low: int, high: int | None) -> Iterator[tuple[dict[str, Any], list[Discovery]]]:
        """Numbers one by one under any map."""
        path = "python" if self.path == "numpy" else self.path
        for start, end in cycle_search.chunks(self.map, low, high, path):
            began = time.monotonic()
            limits = Limits.of(self.map, max(abs(start), abs(end)))
            totals = cycle_search.examine(self.map, start, end, limits, path, self.workers, self.stopping)
            if totals is None:
                return
            found = self._judge((*totals.cycles, *totals.unresolved), limits)
            yield self._entry(start, end, cycle_search.ALGORITHM, totals.as_dict(), began), found

    def _judge(self, numbers: tuple[int, ...], limits: Limits) -> list[Discovery]:
        """The discoveries among these, each once."""
        found = []
        for n in numbers:
            each = discovery(self.map, n, limits, self.known)
            if each is not None and _what(each) not in self.told:
                self.told.add(_what(each))
                found.append(each)
        return found

    def _entry(self, start: int, end: int, algorithm: str, totals: dict[str, Any], began: float) -> dict[str, Any]:
        return {"kind": "piece", "map": str(self.map), "start": str(start), "end": str(end), "algorithm": algorithm, **totals,
                "path": self.path, "seconds": round(time.monotonic() - began, 3)}  # fmt: skip


def _what(found: Discovery) -> int:
    return found.number if found.cycle is None else found.cycle.representative


def lower_priority(nice: int) -> None:
    """Lets everything else on the machine go first; 19 is the lowest. Never raises it."""
    os.setpriority(os.PRIO_PROCESS, 0, max(nice, os.getpriority(os.PRIO_PROCESS, 0)))


def default_log(map: Map, start: int) -> Path:
    """A name in the working folder that says what is searched."""
    text = spelled(start).replace(",", "")
    text = text if len(text) <= 60 else f"{text[:20]}_{len(text)}_digits_{text[-20:]}"
    return Path(f"collatz-search-{map}-from-{text}.jsonl")


OF_A_JOB = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}  # what makes `treadle` one of several processes
SECONDS_TO_STOP = 20.0


class BackgroundSearch:
    """`treadle collatz search` in a process of its own, of the lowest priority, that ends with this one. Its log is all that the
    two share, so nothing is lost however either of them ends, and a search started again goes on."""

    def __init__(self, start: int, log: str | Path, map: Map = COLLATZ, workers: int = 1, count: int | None = None) -> None:
        """The numbers from start on, `count` of them or without an end, in `workers` threads."""
        self.map, self.log, self.first, self.count, self.workers = map, Path(log), start, count, workers
        self.covered: list[Interval] = []
        self._tail = Tail(self.log)
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._stopped = False

    @property
    def reached(self) -> int:
        """Everything from the start up to here is done, as far as `poll` has seen."""
        return next((high for low, high in self.covered if low <= self.first < high), self.first)

    def start(self) -> None:
        """Begins, or goes on; what the log already holds is no news any more."""
        if self._process is not None and self._process.poll() is None:
            return
        self.poll()
        self._stopped = False
        self._errors = tempfile.TemporaryFile()
        safe = ["-P"] if sys.flags.safe_path else []
        count = [] if self.count is None else ["--count", str(self.count)]
        self._process = subprocess.Popen(
            [sys.executable, *safe, "-m", "treadle", "collatz", "search", *count, "--map", str(self.map), "--log", str(self.log),
             "--workers", str(self.workers), "--nice", "19", "--end-with", str(os.getpid()), "--", str(self.first)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors, start_new_session=True,  # Ctrl-C is ours
            env={name: value for name, value in os.environ.items() if name not in OF_A_JOB},
        )  # fmt: skip

    def poll(self) -> list[Discovery]:
        """What has been discovered since the last call; also brings `reached` up to date. Never waits."""
        found = []
        for entry in self._tail.new():
            if entry["kind"] == "discovery":
                found.append(Discovery.from_dict(entry["discovery"]))
            elif entry["kind"] == "piece":
                self.covered = joined([*self.covered, (int(entry["start"]), int(entry["end"]))])
        return found

    def problem(self) -> str | None:
        """Why the search has ended although nobody stopped it and its numbers are not done; None otherwise."""
        if self._process is None or self._stopped or self._process.poll() in (None, 0):
            return None
        assert self._errors is not None
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return said[-1] if said else f"its process ended with code {self._process.returncode}"

    def stop(self) -> None:
        """Ends it within a second or so; its log keeps all finished pieces. Does nothing where it has ended."""
        self._stopped = True
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
