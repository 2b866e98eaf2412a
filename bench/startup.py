"""Seconds to `treadle --help`, and from the command to the first loss: first time (nothing cached), and afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds_to(line: list[str], mark: str | None, folder: str, cache: str) -> float:
    """Until `mark` stands in the output, or until the end."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "treadle", *line], cwd=folder, env={**os.environ, "TREADLE_CACHE": cache},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for text in process.stdout:
        if mark is not None and text.startswith(mark):
            break
    taken = time.perf_counter() - begun
    process.kill()
    process.wait()
    return taken


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(__file__).parents[1]
        os.environ["PYTHONPATH"] = f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        helps = [seconds_to(["--help"], None, folder, folder) for _ in range(5)]
        print(f"treadle --help: {sorted(helps)[2]:.2f} s (goal < 0.5)")
        for goal, run in ((8, "first"), (4, "second"), (4, "third")):
            taken = seconds_to(["train", "--run_name", run], "step 1/", folder, folder)
            print(f"first loss, {run} time: {taken:.2f} s (goal < {goal})")


if __name__ == "__main__":
    main()
