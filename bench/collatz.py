"""The Collatz verifier beside what else proves numbers near 2^68, in turns, by CPU seconds of one thread.

    python -m bench.collatz [--only verify | audit] [--rounds 5] [--barina PATH_TO_WORKER[:BITS] ...] [--large]

A plain C loop (peers/collatz_verify.c, compiled here) is always among them. Barina's worker (github.com/xbarin02/collatz,
src/worker) is built by whoever has it, for example

    make USE_LIBGMP=1 USE_SIEVE=1 USE_PRECALC=1 USE_SIEVE9=1 USE_LUT50=1 SIEVE_LOGSIZE=24

and runs in its own folder, where its sieve's map lies, over 2^BITS numbers (34; with a sieve of 2^32 at least 36, since it
reads the whole map for every task). --large: also a block of 2^40 numbers.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from treadle.collatz.audit import audit as audit_block
from treadle.collatz.blocks import Totals, resolved, run_unit, units

SOURCE = Path(__file__).parent / "peers" / "collatz_verify.c"
PLAIN_BITS, BITS = 31, 36
EXPONENT = 68


def machine() -> str:
    """The processor as lscpu names it, its cores, and the interpreter."""
    try:
        said = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, timeout=10).stdout
        found = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
    except (OSError, subprocess.SubprocessError):
        found = {}
    kind = " ".join(found[name].strip() for name in ("Model name", "CPU family", "Model") if name in found)
    wide = "AVX-512" if "avx512f" in found.get("Flags", "") else "no AVX-512"
    return f"{kind or platform.processor()}, {found.get('CPU(s)', '?').strip()} cores, {wide}, Python {platform.python_version()}"


def ours(bits: int, threads: int = 1) -> tuple[float, float, Totals]:
    """(CPU seconds, seconds, totals) of the block of 2^bits numbers at 2^68."""
    work = units(1 << (EXPONENT - bits), bits)
    cpu, wall = time.process_time(), time.perf_counter()
    if threads == 1:
        found = Totals.total(run_unit(unit) for unit in work)
    else:
        with ThreadPoolExecutor(threads) as pool:
            found = Totals.total(pool.map(run_unit, work))
    return time.process_time() - cpu, time.perf_counter() - wall, found


def plain(program: Path, bits: int) -> tuple[float, str]:
    said = subprocess.run(
        [str(program), str(bits)], capture_output=True, text=True, check=True, timeout=3600
    ).stdout.split()
    return float(said[0]), f"maximum {said[3]} at offset {said[4]}"


def barina(worker: Path, bits: int) -> tuple[float, str]:
    command = [str(worker.resolve()), "-t", str(bits), str(1 << (EXPONENT - bits))]
    said = subprocess.run(
        command, cwd=worker.resolve().parent, capture_output=True, text=True, check=True, timeout=3600
    ).stdout
    found = dict(line.split(" ", 1) for line in said.splitlines() if " " in line)
    return int(
        found["TIME"].split()[1]
    ) * 1e-6, f"maximum {found.get('MAXIMUM', '?')} at offset {found['MAXIMUM_OFFSET']}"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def verify(given: argparse.Namespace) -> None:
    """Numbers proved a CPU second near 2^68, one thread."""
    peers: dict[str, tuple[int, Callable[[], tuple[float, str]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "verify"
        try:
            subprocess.run(["cc", "-O3", "-march=native", "-o", str(program), str(SOURCE)], check=True, timeout=120)
            peers["plain C, sieve of 2^20"] = PLAIN_BITS, lambda: plain(program, PLAIN_BITS)
        except (OSError, subprocess.SubprocessError) as problem:
            print(f"plain C          left out: {problem}")
        for text in given.barina:
            path, _, size = text.partition(":")
            peers[f"Barina's {Path(path).name}"] = int(size or 34), lambda p=Path(path), b=int(size or 34): barina(p, b)
        begun = time.process_time()
        ours(30)
        print(
            f"ours is {resolved('auto')}; the first block, with compilation or its cache and the bit-vectors: {time.process_time() - begun:.1f} s"
        )
        rates: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        said: dict[str, str] = {}
        scaling: list[float] = []
        costs: list[float] = []
        for _ in range(given.rounds):
            cpu, wall, totals = ours(BITS)
            rates["ours"].append(2.0**BITS / cpu)
            for name, (bits, way) in peers.items():
                seconds, said[name] = way()
                rates[name].append(2.0**bits / seconds)
            both = ours(BITS, 2)
            scaling.append(wall / both[1])
            costs.append(cpu / both[0])
    print(f"ours             {spread([rate / 1e9 for rate in rates['ours']])} 10^9 numbers a CPU second, 2^{BITS} numbers at 2^{EXPONENT}: "
          f"{totals.candidates:,} followed, maximum {totals.maximum // 2} (shortcut steps) at offset {totals.argmax - (1 << EXPONENT)}")  # fmt: skip
    goals = {name: 4 if "32" in name else 6 for name in peers if "Barina" in name}
    for name, (bits, _) in peers.items():
        ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates[name])]
        goal = f" (goal {goals[name]})" if name in goals else ""
        print(
            f"{name:<24} {spread([rate / 1e9 for rate in rates[name]])} 10^9, 2^{bits} numbers, {said[name]}; ours: {spread(ratios)} times{goal}"
        )
    print(
        f"two threads      {spread(scaling)} times one, by the clock (goal 1.9 on two free cores); "
        f"one takes {spread(costs)} of the CPU seconds of two"
    )
    if given.large:
        cpu, wall, totals = ours(40)
        print(
            f"2^40 numbers     {cpu:.1f} CPU seconds (goal 60), {2**40 / cpu / 1e9:.1f} 10^9 numbers a second, {totals.candidates:,} followed"
        )


def audit(given: argparse.Namespace) -> None:
    """What an audit costs beside the proof that it audits: 8 small blocks with a witness for each excluded number, 8 units again."""
    work = units(1 << (EXPONENT - BITS), BITS)
    costs: list[float] = []
    for seed in range(given.rounds):
        begun = time.process_time()
        totals = {unit.prefix: run_unit(unit) for unit in work}
        proved = time.process_time()
        report = audit_block(1 << (EXPONENT - BITS), BITS, totals, seed=seed)
        audited = time.process_time() - proved
        assert report.passed, report.lines()
        costs.append(audited)
    print(f"audit            {spread(costs)} CPU seconds for 8 small blocks and 8 of {len(work)} units of 2^{BITS} numbers, which took "
          f"{proved - begun:.2f}")  # fmt: skip


def measure(quick: bool) -> dict[str, Any]:
    """For `python -m bench`: numbers proved a CPU second, ours and the plain loop's, medians of neighbouring runs."""
    mine, plain_bits, rounds = (32, 27, 1) if quick else (BITS, PLAIN_BITS, 3)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "verify"
        try:
            subprocess.run(["cc", "-O3", "-march=native", "-o", str(program), str(SOURCE)], check=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as problem:
            return {"collatz": f"skipped (the plain loop does not compile: {type(problem).__name__})"}
        ours(30)  # compiles, or reads its cache
        rates = [(2.0**mine / ours(mine)[0], 2.0**plain_bits / plain(program, plain_bits)[0]) for _ in range(rounds)]
    found["ours: 10^9 numbers per CPU-second"] = statistics.median(a for a, _ in rates) / 1e9
    found["plain C: 10^9 numbers per CPU-second"] = statistics.median(b for _, b in rates) / 1e9
    found["ours over plain C"] = statistics.median(a / b for a, b in rates)
    return found


PARTS = {part.__name__: part for part in (verify, audit)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.collatz", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--only", choices=list(PARTS), help="one part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--barina", action="append", default=[], metavar="WORKER[:BITS]", help="a built worker; may be repeated"
    )
    parser.add_argument("--large", action="store_true", help="also a block of 2^40 numbers")
    given = parser.parse_args()
    print(machine())
    for name, part in PARTS.items():
        if given.only in (None, name):
            part(given)


if __name__ == "__main__":
    main()
