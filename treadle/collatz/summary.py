"""What a person reads of a verification: the line while it runs, and the end."""

from __future__ import annotations

import math
import shlex

from treadle.collatz.arithmetic import spelled
from treadle.collatz.merge import named
from treadle.collatz.progress import duration, rounded
from treadle.collatz.verify import VERIFIED, Progress, Result


def progress_line(at: Progress) -> str:
    """ "43.75% of 2^36  2.03e10 n/s  ETA 0:02"."""
    share = f"{100 * at.done / at.total:.2f}% of {spelled(at.total)}"
    if at.remaining is None:
        return f"{share}  {duration(at.seconds)} so far"
    return f"{share}  {rounded(at.rate)} n/s  ETA {duration(at.remaining)}"


def lines_of(result: Result, signal: str | None) -> list[str]:
    """The end of a verification: what is proved, how fast, the largest number, where the certificate is, what to do next."""
    at, totals = result.progress, result.totals
    said = [f"!!! {n} did not come below itself: a possible counterexample" for n in result.unresolved[:20]]
    if result.complete:
        said += _conclusion(result)
    else:
        count = result.end - result.start
        kept = at.done - result.proved
        said.append(f"not finished: {result.proved:,} of {count:,} numbers proved ({100 * result.proved / count:.2f}%)"
                    + (f"; of blocks in work another {100 * kept / count:.2f}% are kept" if kept > 0 and not result.unresolved else ""))  # fmt: skip
    new = at.done - at.before
    if new:
        speed = f"{new:,} numbers in {duration(at.seconds)}" + (f", {rounded(at.rate)} n/s" if at.seconds else "")
        said.append(f"this run: {speed} ({result.path}, {result.workers} at once)" + (f"; {at.before:,} were done before" if at.before else ""))
    elif at.before:
        said.append("nothing was left to do")
    if totals.candidates:
        said.append(f"largest number met: {totals.maximum} (2^{math.log2(totals.maximum):.2f}) from {totals.argmax}")
    if totals.overflow:
        said.append(f"{len(totals.overflow):,} numbers left 128 bits on their way and were followed in Python integers")
    said.append(f"certificate: {result.certificate}")
    if result.blocks:
        said.append(f"digest {result.digest}")
    if signal is not None and not result.complete:
        said.append(f"stopped by {signal}; the same command continues")
    elif result.complete:
        said.append(f"check it: treadle collatz audit {shlex.quote(result.certificate)}")
    return said


def _conclusion(result: Result) -> list[str]:
    interval = named(result.start, result.end)
    if result.start == 1:
        return [f"proved: every n in {interval}, reaches 1"]
    known = " (Barina 2025, J. Supercomput., has all below 2^71)" if result.start <= VERIFIED else ""
    return [f"proved: every n in {interval}, comes below itself",
            f"so they reach 1 if all below {spelled(result.start)} do{known}"]  # fmt: skip
