"""Whether a certificate can be believed: its lines, its claims that are cheap to check, and some of its work done again.

A sieve that is wrong never shows in results, because everything it leaves out converges all the same. So the audit also asks
for a witness of every number that the sieve left out in small blocks beside those of the certificate (audit.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.collatz import audit, blocks, ledger, merge, sieve
from treadle.collatz.arithmetic import spelled
from treadle.collatz.blocks import Totals, Unit
from treadle.collatz.certificates import Numbers, Piece, read
from treadle.collatz.ledger import Ledger
from treadle.collatz.workers import Work, compute
from treadle.errors import ConfigError, TreadleError

MOST_SAMPLES = 1_000_000
BLOCKS_OF = 4  # small blocks that are searched within one block
MOST_FOLLOWED = 20_000  # maxima that are followed again, about .2 ms each


class Refuted(TreadleError):
    """A certificate did not pass its audit."""

    exit_code = 65


@dataclass
class Checked:
    """What an audit looked at, and everything that it found wrong."""

    certificate: str
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    blocks: int = 0
    intervals: list[ledger.Interval] = field(default_factory=list)
    maxima: int = 0
    recomputed: int = 0
    justified: int = 0  # excluded numbers whose witness was found
    digest: str = ""

    def as_dict(self) -> dict[str, Any]:
        intervals = [[str(low), str(high)] for low, high in self.intervals]
        return {**self.__dict__, "intervals": intervals, "passed": not self.failures}

    def lines(self) -> list[str]:
        said = [f"note: {note}" for note in self.notes] + [f"FAILED: {failure}" for failure in self.failures]
        said += [f"claims {merge.named(low, high)}" for low, high in self.intervals]
        said.append(f"checked: {self.blocks:,} blocks and their hashes, {self.maxima:,} maxima followed again, {self.recomputed:,} units "
                    f"computed again, {self.justified:,} excluded numbers with a witness each")  # fmt: skip
        said.append(f"digest {self.digest}")
        said.append("the certificate FAILED its audit" if self.failures else "the certificate passed its audit")
        return said


def check_certificate(
    path: str | Path, samples: int = 8, seed: int = 0, calculation: str = "auto", progress: Callable[[str], None] = lambda text: None
) -> Checked:
    """Audits a certificate. samples: how many units are computed again, and how many small blocks are searched for numbers
    left out without a reason; seed chooses them. calculation: the path of blocks.run_unit. ConfigError for no certificate."""
    if not 1 <= samples <= MOST_SAMPLES:
        raise ConfigError(f"--samples {samples}: from 1 to {MOST_SAMPLES:,}")
    reading = read(path)
    found = Ledger([reading])
    report = Checked(str(path), blocks=len(found.pieces), intervals=found.covered(), digest=found.digest())
    report.failures += [f"{place}: {reason}" for place, reason, _ in reading.unseen]
    if len(reading.damaged) > len(reading.unseen):
        report.notes.append(f"{len(reading.damaged) - len(reading.unseen)} damaged lines whose work a later run has done again")
    if reading.torn:
        report.notes.append("the last line was cut off; it claims nothing")
    report.failures += [str(overlap) for overlap in found.disagreements]
    report.failures += [f"{n} did not come down: a possible counterexample" for n in found.unresolved]
    if not found.pieces and not found.units and not report.failures:
        raise ConfigError(f"{path} claims nothing yet; go on with treadle collatz verify")
    others = [name for name in found.algorithms if name != blocks.ALGORITHM]
    if others:
        report.failures.append(f"blocks of the algorithm {', '.join(others)} cannot be computed again by this treadle ({blocks.ALGORITHM})")
    pieces = sorted((p for p in found.pieces.values() if p.algorithm == blocks.ALGORITHM), key=lambda piece: piece.key)
    chance = random.Random(seed)
    _follow_maxima(report, pieces, chance)
    _compute_again(report, found, pieces, samples, chance, calculation, progress)
    _look_for_witnesses(report, found, samples, chance, calculation, progress)
    return report


def _follow_maxima(report: Checked, pieces: list[Piece], chance: random.Random) -> None:
    """A block's maximum is one number's, which is followed again in Python integers."""
    for piece in pieces if len(pieces) <= MOST_FOLLOWED else chance.sample(pieces, MOST_FOLLOWED):
        totals = piece.totals
        if not totals.candidates:
            continue
        report.maxima += 1
        if not piece.start <= totals.argmax < piece.end:
            report.failures.append(f"{piece.place}: its maximum is said to be that of {totals.argmax}, which is not in it")
        elif (true := blocks.direct(totals.argmax).maximum) != totals.maximum:
            report.failures.append(f"{piece.place}: from {totals.argmax} the largest number met is {true}, not {totals.maximum}")


def _compute_again(
    report: Checked, found: Ledger, pieces: list[Piece], samples: int, chance: random.Random, calculation: str,
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Random units, of finished blocks and of others, must give the recorded totals once more."""
    claims: list[tuple[str, Work, Totals]] = []
    for piece in chance.sample(pieces, min(samples, len(pieces))):
        for prefix in chance.sample(sorted(piece.parts), min(-(-samples // min(samples, len(pieces))), len(piece.parts))):
            work = Numbers(piece.start, piece.count) if piece.bits is None else Unit(piece.start >> piece.bits, piece.bits, prefix, piece.prefix_bits)
            claims.append((str(piece.place), work, piece.parts[prefix]))
    open_units = [r for key, by_prefix in found.units.items() if key not in found.pieces for r in by_prefix.values()]
    mine = [record for record in open_units if record.algorithm == blocks.ALGORITHM]
    claims += [(str(r.place), r.unit, r.totals) for r in chance.sample(mine, min(len(mine), max(0, samples - len(claims))))]
    for number, (place, work, recorded) in enumerate(claims, 1):
        progress(f"computing unit {number} of {len(claims)} again")
        totals = compute(work, calculation).totals
        report.recomputed += 1
        if totals != recorded:
            different = [name for name, value in totals.as_dict().items() if value != recorded.as_dict()[name]]
            report.failures.append(f"{place}: {work} gives other totals when it is computed again ({', '.join(different)} differ)")


def _look_for_witnesses(
    report: Checked, found: Ledger, samples: int, chance: random.Random, calculation: str, progress: Callable[[str], None]
) -> None:
    """Everything that the sieve leaves out in small blocks with the upper bits of the certificate's blocks has a witness."""
    claimed = sorted({(start, size.bit_length() - 1) for start, size, ragged, _ in [*found.pieces, *found.units] if not ragged})
    claimed = [(start, bits) for start, bits in claimed if start + (1 << bits) > sieve.FLOOR]  # below, all are followed
    if not claimed:
        return
    chosen = chance.sample(claimed, min(len(claimed), max(1, samples // BLOCKS_OF)))
    for number, (start, bits) in enumerate(chosen, 1):
        progress(f"looking for witnesses in block {number} of {len(chosen)}")
        seen = audit.audit(start >> bits, bits, None, -(-samples // len(chosen)), chance.getrandbits(32), calculation)
        report.justified += sum(seen.witnesses.values())
        if seen.unjustified:
            report.failures.append(f"block {spelled(start)} of 2^{bits}: the sieve of this treadle leaves out {len(seen.unjustified)} numbers without "
                                   f"a reason, as {seen.unjustified[0]}: nothing that it made is proved")  # fmt: skip
        report.failures += seen.disagreements
