"""Several certificates as one: every line checked, the interval proved covered or its holes named, contradictions found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.collatz import ledger
from treadle.collatz.arithmetic import spelled
from treadle.collatz.blocks import Totals
from treadle.collatz.certificates import Reading, UnitRecord, header, read, sealed, unit_record
from treadle.collatz.ledger import Interval, Ledger, Overlap
from treadle.errors import ConfigError, DataError


@dataclass(frozen=True)
class Merged:
    """What certificates prove together."""

    start: int
    end: int
    holes: tuple[Interval, ...]
    overlaps: tuple[Overlap, ...]
    damaged: tuple[str, ...]  # sentences
    algorithms: tuple[str, ...]
    blocks: int
    totals: Totals
    unresolved: tuple[int, ...]
    digest: str
    output: str | None

    @property
    def complete(self) -> bool:
        return not self.holes and not self.unresolved

    def as_dict(self) -> dict[str, Any]:
        return {
            "start": str(self.start), "end": str(self.end), "complete": self.complete,
            "holes": [[str(low), str(high)] for low, high in self.holes], "overlaps": [str(each) for each in self.overlaps],
            "damaged": list(self.damaged), "algorithms": list(self.algorithms), "blocks": self.blocks,
            **{name: value for name, value in self.totals.as_dict().items() if name != "unresolved"},
            "unresolved": [str(n) for n in self.unresolved], "digest": self.digest, "output": self.output,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        said = list(self.damaged)
        if len(self.algorithms) > 1:
            said.append(f"several algorithms: {', '.join(self.algorithms)}; their sums cannot be compared, what they prove can")
        shown = self.overlaps[:10]
        said += [f"overlap: {overlap}" for overlap in shown]
        if len(self.overlaps) > len(shown):
            said.append(f"... and {len(self.overlaps) - len(shown):,} overlaps more, none of which disagree")
        said += [f"hole: {named(low, high)} is not proved; close it with treadle collatz verify {low} {high}" for low, high in self.holes]
        said += [f"!!! {n} did not come down: a possible counterexample" for n in self.unresolved]
        if self.complete:
            said.append(f"proved: every n in {named(self.start, self.end)}, comes below itself; {self.blocks:,} blocks cover it")
        if self.totals.candidates:
            said.append(f"largest number met: {self.totals.maximum} from {self.totals.argmax}")
        said.append(f"digest {self.digest}")
        if self.output:
            said.append(f"merged certificate: {self.output}")
        return said


def named(start: int, end: int) -> str:
    """An interval for people: [2^68, 2^68+2^36), 68,719,476,736 numbers."""
    return f"[{spelled(start)}, {spelled(end)}), {end - start:,} numbers"


def defects(reading: Reading) -> list[str]:
    """What is wrong with the lines of a certificate, in sentences."""
    said = [f"{place} is damaged: {reason}; it is not used" for place, reason, _ in reading.damaged]
    if reading.torn:
        said.append(f"{reading.path}: the last line was cut off; it is not used")
    return said


def merge(
    paths: Sequence[str | Path], start: int | None = None, end: int | None = None, output: str | Path | None = None
) -> Merged:
    """What the certificates prove of [start, end), by default of all between their first and last block; written as one
    certificate to `output`, a new file. DataError where two lines disagree, naming both."""
    if not paths:
        raise ConfigError("name certificates: treadle collatz merge A.jsonl B.jsonl")
    if output is not None and os.path.lexists(output):
        raise ConfigError(f"{output} is there already, and merging writes a new file; choose another --output")
    readings = [read(path) for path in paths]
    found = Ledger(readings)
    if found.disagreements:
        said = "; ".join(str(overlap) for overlap in found.disagreements[:5])
        raise DataError(f"the certificates contradict each other: {said}. One of them is wrong: treadle collatz audit each, "
                        "then merge without it")  # fmt: skip
    covered = found.covered()
    if not covered and (start is None or end is None):
        raise ConfigError(f"{', '.join(str(path) for path in paths)}: no block is finished; go on with treadle collatz verify")
    start = max(1, covered[0][0]) if start is None else start
    end = covered[-1][1] if end is None else end
    if not 0 < start < end:
        raise ConfigError(f"--from {start} --to {end}: the interval has to begin at 1 or later and to end above its start")
    pieces = found.within(start, end)
    written = _write(found, Path(output)) if output is not None else None
    return Merged(
        start, end, tuple(found.holes(start, end)), tuple(found.overlaps + found.cuts()),
        tuple(said for reading in readings for said in defects(reading)), tuple(found.algorithms), len(pieces),
        ledger.total(pieces), tuple(n for n in found.unresolved if start <= n < end), found.digest(start, end), written,
    )  # fmt: skip


def _write(found: Ledger, output: Path) -> str:
    """All finished pieces, also those with a number that does not come down, then units of unfinished blocks."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part")
    with open(part, "wb") as stream:
        stream.write(sealed(header()))
        for piece in sorted(found.pieces.values(), key=lambda piece: piece.key):
            stream.write(sealed(piece.record()))
        for record in _left(found):
            stream.write(sealed(unit_record(record)))
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(output)
    return str(output)


def _left(found: Ledger) -> list[UnitRecord]:
    units = [record for key, by_prefix in found.units.items() if key not in found.pieces for record in by_prefix.values()]
    return sorted(units, key=lambda record: (record.unit.start, record.unit.bits, record.unit.prefix))
