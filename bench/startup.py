"""Seconds to `treadle --help`, and from the command to the first loss: first time (nothing cached), and afterwards.

    python -m bench.startup [--quick]

Wall seconds count on a quiet machine, CPU seconds on a loaded one. On all cores, as a user has it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import machine

GOALS = {"help": 0.5, "first": 8.0, "again": 2.0}


def users_environment(cache: str) -> dict[str, str]:
    """Without what the bench sets for itself; a warm cache holds the bytecode too."""
    unset = ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return {**{name: value for name, value in os.environ.items() if name not in unset}, "TREADLE_CACHE": cache, "PYTHONPATH": path}


def seconds_to(line: list[str], mark: str | None, folder: str, cache: str) -> tuple[float, float]:
    """(wall, CPU) until `mark` stands in the output, or until the end."""
    environment = users_environment(cache)
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "treadle", *line], cwd=folder, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for text in process.stdout:
        if mark is not None and text.startswith(mark):
            break
    taken = time.perf_counter() - begun
    if mark is None:
        process.wait()
        return taken, float("nan")
    used = cpu_seconds(process.pid)
    process.kill()
    process.wait()
    return taken, used


def cpu_seconds(pid: int) -> float:
    """Of another process that runs; nan where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Reads the clock at the very line: on a loaded machine the parent sees it late, when the child has gone on.
PROGRAM = """
import os, sys, time
out = sys.stdout
class Watch:
    def write(self, text):
        if "step 1/" in text:
            os.write(2, f"\\n{time.process_time()}".encode())
            os._exit(0)
        return out.write(text)
    def __getattr__(self, name):
        return getattr(out, name)
sys.stdout = Watch()
from treadle.cli import main
sys.argv = ["treadle", "train", "--run_name", RUN]
main()
"""


def own_cpu_seconds(run: str, folder: str, cache: str) -> float:
    """CPU seconds of a training from the interpreter's start to its first loss."""
    environment = users_environment(cache)
    program = PROGRAM.replace("RUN", repr(run))
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, env=environment)
    return float(done.stderr.splitlines()[-1])


def measure(quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        helps = [seconds_to(["--help"], None, folder, folder)[0] for _ in range(1 if quick else 5)]
        first, *again = [
            seconds_to(["train", "--run_name", f"run{i}"], "step 1/", folder, folder) for i in range(2 if quick else 4)
        ]
        used = [own_cpu_seconds(f"own{i}", folder, folder) for i in range(1 if quick else 5)]
    values: dict[str, Any] = {"--help: seconds": statistics.median(helps), "first loss, nothing cached: seconds": first[0],
              "first loss, nothing cached: CPU seconds": first[1],
              "first loss, warm cache: seconds": statistics.median(wall for wall, _ in again),
              "first loss, warm cache: CPU seconds": statistics.median(used)}  # fmt: skip
    if machine.loaded():
        busy = f"skipped (the machine is loaded; then {values['first loss, warm cache: seconds']:.1f} s)"
        values |= {"first loss, warm cache: seconds": busy, "first loss, nothing cached: seconds": "skipped (the machine is loaded)"}
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    for name, value in measure(parser.parse_args().quick).items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.2f')}")
    print(f"goals, wall seconds on a quiet machine: --help {GOALS['help']}, nothing cached {GOALS['first']}, warm cache {GOALS['again']}")


if __name__ == "__main__":
    main()
