"""A long search for records with a log that it goes on from, and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from treadle.collatz.ledger import missing
from treadle.collatz.records import Record, RecordSearch, advance_in_pieces, check_limit
from treadle.collatz.search_log import SearchLog


@dataclass(frozen=True)
class Progress:
    """Where the search stands; seconds are since its start."""

    reached: int
    below: int
    before: int  # where this run began
    count: int  # records
    seconds: float

    @property
    def rate(self) -> float:
        return (self.reached - self.before) / self.seconds if self.seconds > 0 else 0.0

    @property
    def remaining(self) -> float:
        """Seconds; time per number hardly depends on its size."""
        return (self.below - self.reached) / self.rate if self.rate else 0.0


def search(
    below: int,
    kind: str = "delay",
    path: str = "auto",
    log: str | Path | None = None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda at: None,
    say: Callable[[str], None] = lambda text: None,
) -> RecordSearch:
    """All records below, or as many as there are when `stopping`; with a log, what that holds is not searched again.

    The records of the log are worked out again, so a wrong one is an error; that none is missing rests on its lines' hashes."""
    check_limit(below)
    found = RecordSearch(kind, path)
    writer = None if log is None else SearchLog(log, {"records": kind})
    try:
        if writer is not None:
            if writer.reading.torn or writer.reading.damaged:
                say(f"{log}: damaged lines, or one cut off, are done again")
            reached = next(missing(writer.reading.covered(), 1, None))[0]
            entries = (entry for entry in writer.reading.pieces() if int(entry["end"]) <= reached)
            records = {int(number): int(value) for entry in entries for number, value in entry["records"]}
            found.resume(reached, [Record(number, records[number]) for number in sorted(records)])
        began, before, last = time.monotonic(), found.reached, found.reached

        def seen(new: list[Record]) -> bool:
            nonlocal last
            if writer is not None:
                writer.append({"kind": "piece", "start": str(last), "end": str(found.reached),
                               "records": [[str(each.number), str(each.value)] for each in new]})  # fmt: skip
            last = found.reached
            progress(Progress(found.reached, below, before, len(found.records), time.monotonic() - began))
            return stopping()

        advance_in_pieces(found, below, seen)
    finally:
        if writer is not None:
            writer.close()
    return found
