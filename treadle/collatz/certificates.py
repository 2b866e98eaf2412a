"""Certificates: what a verification found, as lines of JSON that are only ever appended, each with its own SHA-256.

The first line says which map, algorithm and machine; then comes one line for every finished unit of a block, one for every
finished block with its sub-totals, and one for the few numbers of a ragged end that no block holds. Integers of the
trajectories are decimal strings. A hash finds damage, not forgery: what a certificate claims is checked by computing some of
it again (`treadle collatz audit`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from treadle.collatz import blocks
from treadle.collatz.append_only import AppendOnlyFile
from treadle.collatz.blocks import Totals, Unit
from treadle.errors import ConfigError, DataError

FORMAT = "treadle-collatz-1"
MAP = "3x+1"
WHOLE_BELOW = 20  # bits
BEGINS = b'{"algorithm":'  # every line of a certificate, also a torn one
SYNC_SECONDS = 1.0  # what a power cut may lose; a killed process loses nothing that it had written


@dataclass(frozen=True)
class Numbers:
    """The n in [first, first + count), at an end of an interval where no aligned block of 2^8 fits."""

    first: int
    count: int

    @property
    def size(self) -> int:
        return self.count


@dataclass(frozen=True)
class Place:
    """Where a record stands."""

    path: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path} line {self.line}"


@dataclass(frozen=True)
class UnitRecord:
    """A finished unit of a block that may not be finished yet."""

    unit: Unit
    totals: Totals
    algorithm: str = blocks.ALGORITHM
    path: str = ""
    seconds: float = 0.0
    place: Place = Place()


@dataclass(frozen=True)
class Piece:
    """A finished block with the sub-totals of its units, or the numbers of a ragged end (bits is None)."""

    start: int
    count: int
    bits: int | None
    prefix_bits: int
    parts: Mapping[int, Totals]  # by prefix; of a ragged end: its totals under 0
    algorithm: str = blocks.ALGORITHM
    paths: tuple[str, ...] = ()
    seconds: float = 0.0  # of work, summed over the units
    place: Place = Place()

    @property
    def end(self) -> int:
        return self.start + self.count

    @cached_property
    def totals(self) -> Totals:
        return Totals.total(self.parts.values())

    @property
    def key(self) -> tuple[int, int, bool, str]:
        return self.start, self.count, self.bits is None, self.algorithm

    def content(self) -> dict[str, Any]:
        """What is proved, without who did it and how long it took: equal however the work was shared or interrupted."""
        found: dict[str, Any] = {"map": MAP, "algorithm": self.algorithm, "totals": self.totals.as_dict()}
        if self.bits is None:
            return found | {"kind": "numbers", "first": str(self.start), "count": self.count}
        parts = [{"prefix": prefix, **self.parts[prefix].as_dict()} for prefix in sorted(self.parts)]
        return found | {"kind": "block", "high": str(self.start >> self.bits), "bits": self.bits,
                        "prefix_bits": self.prefix_bits, "parts": parts}  # fmt: skip

    def record(self) -> dict[str, Any]:
        return self.content() | {"paths": list(self.paths), "seconds": round(self.seconds, 3)}


@lru_cache(maxsize=256)  # a block is asked for with each of its units, .4 ms every time
def block_units(high: int, bits: int) -> tuple[Unit, ...]:
    """How a block is worked on and recorded: the sieve's own split, but small blocks in one go (2^20 numbers are .1 s
    even in Python integers)."""
    return (Unit(high, bits, 0, 0),) if bits < WHOLE_BELOW else tuple(blocks.units(high, bits))


def unit_record(record: UnitRecord) -> dict[str, Any]:
    unit = record.unit
    return {"kind": "unit", "map": MAP, "algorithm": record.algorithm, "high": str(unit.high), "bits": unit.bits,
            "prefix": unit.prefix, "prefix_bits": unit.prefix_bits, "totals": record.totals.as_dict(), "path": record.path,
            "seconds": round(record.seconds, 3)}  # fmt: skip


def header() -> dict[str, Any]:
    """What made the lines that follow. Of the machine only its kind: no name, no user, no folder."""
    return {"kind": "header", "format": FORMAT, "map": MAP, "algorithm": blocks.ALGORITHM, "treadle": _version("treadle"),
            "machine": machine()}  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            model = next((line.partition(":")[2].strip() for line in stream if line.startswith("model name")), model)
    except OSError:
        pass
    return {"processor": model, "cores": os.cpu_count() or 1, "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(), "numpy": _version("numpy"), "numba": _version("numba")}  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---- lines


def canonical(record: Mapping[str, Any]) -> bytes:
    """The one spelling of a record that is hashed: JSON with sorted keys, without spaces."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sealed(record: Mapping[str, Any]) -> bytes:
    """The record with its hash, as a line."""
    return canonical({**record, "sha256": hashlib.sha256(canonical(record)).hexdigest()}) + b"\n"


def unsealed(line: bytes) -> dict[str, Any]:
    """The record of a line; ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ValueError("it is not JSON") from problem
    if not isinstance(record, dict) or not isinstance(record.pop("sha256", None), str):
        raise ValueError("it is no record with a sha256")
    try:
        if sealed(record) != line.rstrip(b"\n") + b"\n":
            raise ValueError("its content does not fit its sha256")
    except RecursionError as problem:
        raise ValueError("it is not JSON of ours") from problem
    return record


def parsed(record: dict[str, Any], place: Place) -> UnitRecord | Piece | dict[str, Any]:
    """A record as an object (a header or a note stays a dict); ValueError where it does not say what it has to."""
    kind = record.get("kind")
    try:
        if kind == "header":
            if record["format"] != FORMAT:
                raise ValueError(f"it is of format {record['format']!r}, this treadle reads {FORMAT}")
            return record
        if kind == "damaged":
            return record
        if record["map"] != MAP:
            raise ValueError(f"it is about the map {record['map']!r}, not {MAP}")
        algorithm, totals, seconds = record["algorithm"], Totals.from_dict(record["totals"]), float(record["seconds"])
        if not isinstance(algorithm, str):
            raise ValueError("its algorithm is no name")
        if kind == "unit":
            unit = Unit(_integer(record["high"]), record["bits"], record["prefix"], record["prefix_bits"])
            if algorithm == blocks.ALGORITHM and unit not in block_units(unit.high, unit.bits):
                raise ValueError("its unit is none of those that its block has")
            return UnitRecord(unit, totals, algorithm, str(record["path"]), seconds, place)
        paths = tuple(str(path) for path in record["paths"])
        if kind == "numbers":
            first, count = _integer(record["first"]), record["count"]
            if type(count) is not int or not 0 < count < 1 << blocks.SMALLEST_BITS:
                raise ValueError(f"it counts {count!r} numbers")
            return Piece(first, count, None, 0, {0: totals}, algorithm, paths, seconds, place)
        if kind == "block":
            return _block(record, totals, Piece(0, 0, None, 0, {}, algorithm, paths, seconds, place))
    except (KeyError, TypeError, AttributeError, OverflowError, ConfigError) as problem:
        raise ValueError(f"it lacks something or has it of another kind ({problem})") from problem
    raise ValueError(f"it is of the unknown kind {kind!r}")


def _block(record: dict[str, Any], totals: Totals, rest: Piece) -> Piece:
    high, bits, prefix_bits = _integer(record["high"]), record["bits"], record["prefix_bits"]
    parts: dict[int, Totals] = {}
    for part in record["parts"]:
        unit = Unit(high, bits, part["prefix"], prefix_bits)
        if unit.prefix in parts:
            raise ValueError(f"it has the prefix {unit.prefix} twice")
        parts[unit.prefix] = Totals.from_dict(part)
    if Totals.total(parts.values()) != totals:
        raise ValueError("its totals are not those of its parts")
    expected = block_units(high, bits)
    if rest.algorithm == blocks.ALGORITHM and (
        set(parts) != {unit.prefix for unit in expected} or prefix_bits != expected[0].prefix_bits
    ):
        raise ValueError(f"its parts are not the {len(expected)} units that its block has")
    return Piece(high << bits, 1 << bits, bits, prefix_bits, parts, rest.algorithm, rest.paths, rest.seconds, rest.place)


def _integer(text: Any) -> int:
    if not isinstance(text, str) or not text.isascii() or not text.isdigit() or len(text) > 400:
        raise ValueError(f"{text!r:.40} is not a number in decimal digits")
    return int(text)


# ---- files


@dataclass
class Reading:
    """The sound records of a file, and what is wrong with the others."""

    path: str
    headers: list[dict[str, Any]] = field(default_factory=list)
    records: list[UnitRecord | Piece] = field(default_factory=list)
    damaged: list[tuple[Place, str, str]] = field(default_factory=list)  # where, why, SHA-256 of the line's bytes
    known: set[str] = field(default_factory=set)  # damage that a later run has seen, and whose work it has done again
    torn: int = 0  # bytes after the last whole line: the process was killed while it wrote
    sound: int = 0  # bytes before them

    @property
    def unseen(self) -> list[tuple[Place, str, str]]:
        """Damage that no later run has taken note of."""
        return [(place, reason, digest) for place, reason, digest in self.damaged if digest not in self.known]


def read(path: str | Path) -> Reading:
    """Every line of a certificate, each checked by itself; ConfigError for a file that is none."""
    found = Reading(str(path))
    begins = b""
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                begins = begins or line[: len(BEGINS)]
                if not line.endswith(b"\n"):
                    found.torn = len(line)
                    break
                found.sound += len(line)
                _take(found, line, Place(str(path), number))
    except FileNotFoundError as problem:
        raise ConfigError(f"there is no certificate {path}; make one with treadle collatz verify START --count N") from problem
    except IsADirectoryError as problem:
        raise ConfigError(f"{path} is a folder; name the certificate, a .jsonl file, in it") from problem
    if begins and not found.headers and (found.sound or not BEGINS.startswith(begins)):
        if begins == BEGINS:
            raise DataError(f"{path} has no sound header ({found.damaged[0][1] if found.damaged else 'it is missing'}), so nothing "
                            "says what its lines are; take another copy, or begin anew with another --output")  # fmt: skip
        raise ConfigError(f"{path} is not a certificate of treadle collatz verify; name another file")
    return found


def _take(found: Reading, line: bytes, place: Place) -> None:
    try:
        record = parsed(unsealed(line), place)
    except ValueError as problem:
        found.damaged.append((place, str(problem), hashlib.sha256(line).hexdigest()))
        return
    if isinstance(record, (UnitRecord, Piece)):
        found.records.append(record)
    elif record["kind"] == "header":
        found.headers.append(record)
    else:
        found.known.update(str(digest) for digest in record.get("lines", ()))


class Log:
    """A certificate that this process, and no other, appends to. What was found in it is in `reading`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = AppendOnlyFile(path, "certificate", "wait for it, stop it, or write another certificate with --output (treadle collatz merge joins them)")
        try:
            self.reading = read(self.path)
            self._begin()
        except BaseException:
            self._file.close()
            raise
        self._unsynced, self._synced = False, time.monotonic()

    def _begin(self) -> None:
        """A torn end is moved aside, damage is noted, and a header is written where the last one was of something else."""
        found = self.reading
        if found.torn:
            with open(self.path, "rb") as stream, open(f"{self.path}.torn", "ab") as aside:
                stream.seek(found.sound)
                aside.write(stream.read(found.torn) + b"\n")
            self._file.truncate(found.sound)
        now = header()
        if not found.headers or found.headers[-1] != now:
            self._file.write(sealed(now))
        if found.unseen:
            lines = [digest for _, _, digest in found.unseen]
            self._file.write(sealed({"kind": "damaged", "algorithm": blocks.ALGORITHM, "numbers": [place.line for place, _, _ in found.unseen], "lines": lines}))
        self._file.sync()

    def append(self, record: UnitRecord | Piece) -> None:
        """Written before this returns, durable after the next `sync`."""
        self._file.write(sealed(unit_record(record) if isinstance(record, UnitRecord) else record.record()))
        self._unsynced = True
        self.sync_if_due()

    def sync_if_due(self) -> None:
        if self._unsynced and time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        self._file.sync()
        self._unsynced, self._synced = False, time.monotonic()

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self._file.sync()
        finally:
            self._file.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def whole(records: Iterable[UnitRecord]) -> Piece | None:
    """The block of these units of one block and one algorithm, or None where one is missing."""
    by_prefix = {record.unit.prefix: record for record in records}
    first = next(iter(by_prefix.values()), None)
    if first is None or first.algorithm != blocks.ALGORITHM:
        return None
    unit = first.unit
    if set(by_prefix) != {each.prefix for each in block_units(unit.high, unit.bits)}:
        return None
    parts = {prefix: record.totals for prefix, record in by_prefix.items()}
    paths = tuple(sorted({record.path for record in by_prefix.values()}))
    seconds = sum(record.seconds for record in by_prefix.values())
    return Piece(unit.start, 1 << unit.bits, unit.bits, unit.prefix_bits, parts, paths=paths, seconds=seconds)
