"""What certificates prove together: their blocks without repetition, contradictions between them, holes, and a digest.

A block is proved when all of its units are there and none holds a number that does not come down. [a, b) is proved when its
blocks cover it; then, if all n in [1, a) reach 1, all n in [a, b) do, in ascending order (blocks.py has the argument).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from treadle.collatz import blocks
from treadle.collatz.arithmetic import spelled
from treadle.collatz.blocks import Totals
from treadle.collatz.certificates import Piece, Place, Reading, UnitRecord, canonical, whole

Interval = tuple[int, int]


@dataclass(frozen=True)
class Overlap:
    """The same numbers twice. agree: None where the two were split in another way, so that only the conclusion is common."""

    what: str
    first: Place
    second: Place
    agree: bool | None

    def __str__(self) -> str:
        said = {True: "agree", False: "DISAGREE", None: "are split in another way and both proved"}[self.agree]
        return f"{self.what}: {self.first} and {self.second} {said}"


class Ledger:
    """The records of one or several certificates."""

    def __init__(self, readings: Iterable[Reading] = ()) -> None:
        self.pieces: dict[tuple[int, int, bool, str], Piece] = {}
        self.units: dict[tuple[int, int, bool, str], dict[int, UnitRecord]] = {}  # of blocks that are not finished
        self.overlaps: list[Overlap] = []  # of the same block or unit
        for reading in readings:
            for record in reading.records:
                self.add(record)

    def add(self, record: UnitRecord | Piece) -> Piece | None:
        """Takes a record up; returns the block that it completes."""
        if isinstance(record, Piece):
            self._add_piece(record)
            return None
        unit = record.unit
        key = (unit.start, 1 << unit.bits, False, record.algorithm)
        piece = self.pieces.get(key)
        if piece is not None:
            self._compare_with_part(record, piece, record.place)
            return None
        units = self.units.setdefault(key, {})
        if unit.prefix in units:
            self._compare(_named(unit), units[unit.prefix], record)
            return None
        units[unit.prefix] = record
        complete = whole(units.values())
        if complete is not None:
            self.pieces[key] = complete
        return complete

    def _add_piece(self, piece: Piece) -> None:
        known = self.pieces.get(piece.key)
        for record in self.units.pop(piece.key, {}).values():
            self._compare_with_part(record, piece, piece.place)
        if known is None or not known.place.path:  # one put together from units has no line of its own yet
            self.pieces[piece.key] = piece
        else:
            what = f"[{spelled(piece.start)}, {spelled(piece.end)})"
            self.overlaps.append(Overlap(what, known.place, piece.place, known.content() == piece.content()))

    def _compare(self, what: str, known: UnitRecord, record: UnitRecord) -> None:
        self.overlaps.append(Overlap(what, known.place, record.place, known.totals == record.totals))

    def _compare_with_part(self, record: UnitRecord, piece: Piece, later: Place) -> None:
        """A block's line repeats what its units' lines say; only another file's, or a difference, is worth a word."""
        agree = piece.parts.get(record.unit.prefix) == record.totals and piece.prefix_bits == record.unit.prefix_bits
        if not agree or (piece.place.path and piece.place.path != record.place.path):
            self.overlaps.append(Overlap(_named(record.unit), record.place, piece.place, agree))

    # ---- what follows from it

    @property
    def disagreements(self) -> list[Overlap]:
        return [overlap for overlap in self.overlaps if overlap.agree is False]

    @property
    def proved(self) -> list[Piece]:
        """Finished pieces without a number that does not come down, ascending."""
        return sorted((p for p in self.pieces.values() if not p.totals.unresolved), key=lambda p: (p.start, p.count))

    @property
    def unresolved(self) -> list[int]:
        """Numbers that did not come down: possible counterexamples."""
        found = {n for piece in self.pieces.values() for n in piece.totals.unresolved}
        return sorted(found | {n for units in self.units.values() for u in units.values() for n in u.totals.unresolved})

    @property
    def algorithms(self) -> list[str]:
        return sorted({key[3] for key in self.pieces} | {key[3] for key in self.units})

    def covered(self) -> list[Interval]:
        """What is proved, as disjoint intervals, ascending. 0 is in a block that begins there, but nothing is said of it."""
        return joined((piece.start, piece.end) for piece in self.proved)

    def holes(self, start: int, end: int) -> list[Interval]:
        """The parts of [start, end) that are not proved."""
        return remaining(self.covered(), start, end)

    def cuts(self) -> list[Overlap]:
        """Blocks that share numbers with another, but not all: split in another way, or by another algorithm."""
        found, last = [], None
        for piece in self.proved:
            if last is not None and piece.start < last.end:
                what = f"[{spelled(piece.start)}, {spelled(min(piece.end, last.end))})"
                found.append(Overlap(what, last.place, piece.place, None))
            if last is None or piece.end > last.end:
                last = piece
        return found

    def within(self, start: int, end: int) -> list[Piece]:
        """The proved pieces that share numbers with [start, end)."""
        return [piece for piece in self.proved if piece.start < end and piece.end > start]

    def digest(self, start: int | None = None, end: int | None = None) -> str:
        """SHA-256 of what the pieces say, without machines and times: equal for an interval however it was worked on."""
        hashed = hashlib.sha256()
        for piece in self.proved:
            if (start is None or piece.end > start) and (end is None or piece.start < end):
                hashed.update(canonical(piece.content()) + b"\n")
        return hashed.hexdigest()


def total(pieces: Iterable[Piece]) -> Totals:
    return Totals.total(piece.totals for piece in pieces)


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, ascending and disjoint."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def missing(covered: Iterable[Interval], start: int, end: int | None) -> Iterator[tuple[int, int | None]]:
    """[start, end), or from start on without an end, without the disjoint, ascending intervals."""
    for low, high in covered:
        if end is not None and low >= end:
            break
        if high > start:
            if low > start:
                yield start, low
            start = high
    if end is None or start < end:
        yield start, end


def remaining(covered: Iterable[Interval], start: int, end: int) -> list[Interval]:
    """[start, end) without the disjoint, ascending intervals."""
    return [(low, end if high is None else high) for low, high in missing(covered, start, end)]


def _named(unit: blocks.Unit) -> str:
    return f"block [{spelled(unit.start)}, {spelled(unit.start + (1 << unit.bits))}), prefix {unit.prefix}"
