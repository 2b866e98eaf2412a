"""What the built-in recipe learns in the CPU-seconds that its first form took: held-out bits per byte.

    python -m bench.demo

The first form (AdamW at 3e-3, cosine, 1200 steps) is timed over some steps, on this machine and with this code, and its CPU-seconds
for all of its steps are the budget; the recipe as it is now trains, and the best evaluation within the budget counts. 150 to 1000 CPU
seconds, so `--quick` leaves it out.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.startup import cpu_seconds

ROOT = Path(__file__).parents[1]
STEPS, TIMED, SKIPPED = 1200, 40, 10
FIRST_FORM = f"""
[model]
arch = "transformer"
hidden_size = 192
num_layers = 4
num_heads = 3
[tokenizer]
name = "bpe"
vocab_size = 2048
[data]
path = "austen"
seq_len = 256
[train]
max_steps = {STEPS}
per_device_train_batch_size = 16
[optim]
name = "adamw"
learning_rate = 3e-3
lr_scheduler_type = "cosine"
[log]
logging_steps = 10
[eval]
eval_steps = 100000
"""
STEP = re.compile(r"^step ([\d,]+)/")
EVALUATION = re.compile(r"^evaluation at step ([\d,]+): .*bpb ([\d.]+)")


def lines(arguments: list[str], folder: str) -> Any:
    """(CPU seconds so far, line) of `treadle train` with these arguments; it ends when the caller stops asking."""
    command = [sys.executable, "-u", "-m", "treadle", "train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield cpu_seconds(process.pid), line
    finally:
        process.kill()
        process.wait()


def budget() -> float:
    """CPU seconds of all steps of the first form."""
    seen: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "first.toml").write_text(FIRST_FORM, encoding="utf-8")
        for used, line in lines(["first.toml"], folder):
            if match := STEP.match(line):
                seen[int(match[1].replace(",", ""))] = used
                if max(seen) >= SKIPPED + TIMED:
                    break
    begin, end = min(s for s in seen if s >= SKIPPED), max(seen)
    return seen[begin] + (seen[end] - seen[begin]) / (end - begin) * (STEPS - begin)


def measure(quick: bool) -> dict[str, Any]:
    if quick:
        return {"demo": "skipped (minutes; python -m bench --only demo)"}
    allowed = budget()
    best, last, used = float("nan"), float("nan"), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for used, line in lines(["--run_name", "now"], folder):
            if match := EVALUATION.match(line):
                last = float(match[2])
                print(f"  {used:.0f} CPU seconds: {line.strip()}", flush=True)
                if used <= allowed:
                    best = last
    return {"CPU seconds of the first form": allowed, "CPU seconds of the recipe": used, "bits per byte within those of the first form": best,
            "bits per byte at the end": last}  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__).parse_args()
    for name, value in measure(False).items():
        print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()
