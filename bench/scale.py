"""Training at other sizes, ours beside the plain loop: rows of 1k to 16k tokens, more parameters, a larger vocabulary.

    python -m bench.scale [--quick]

Each size in processes of its own, two steps after the first two (the first log row opens TensorBoard); the ratio is tokens per CPU
second, ours (auto precision, and fp32) over the plain loop in fp32.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench import contest
from bench.task import Task

SMALL = {"width": 256, "layers": 2, "heads": 4, "steps": 4}
SIZES = {
    "rows of 1k tokens": Task(length=1024, rows=8, **SMALL),
    "rows of 4k tokens": Task(length=4096, rows=2, **SMALL),
    "rows of 16k tokens": Task(length=16384, rows=1, **SMALL),
    "3.2M parameters": Task(width=256, layers=4, heads=4, steps=4),
    "25M parameters": Task(width=512, layers=8, heads=8, rows=8, steps=4),
    "85M parameters": Task(width=768, layers=12, heads=12, rows=4, steps=4),
    "vocabulary of 8k": Task(vocabulary=8192, steps=4),
    "vocabulary of 32k": Task(vocabulary=32768, rows=8, steps=4),
}
QUICK = {"rows of 1k tokens": Task(length=1024, rows=1, width=128, layers=1, heads=2, steps=4)}
NAMES = ("ours auto", "ours fp32", "plain fp32")


def measure(quick: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for what, task in (QUICK if quick else SIZES).items():
        runs = {name: contest.one_run(name, task, skip=2) for name in NAMES}
        for name, run in runs.items():
            values[f"{what}, {name}: tokens per CPU-second"] = task.tokens_per_step / run["cpu"]
            values[f"{what}, {name}: peak GB"] = run["peak_gb"]
        for name in NAMES[:2]:
            values[f"{what}, {name} over plain fp32"] = runs["plain fp32"]["cpu"] / runs[name]["cpu"]
        values[f"{what}, memory of plain fp32 over ours auto"] = runs["plain fp32"]["peak_gb"] / runs["ours auto"]["peak_gb"]
        print(f"  {what}: " + ", ".join(f"{name} {task.tokens_per_step / run['cpu']:.0f}" for name, run in runs.items())
              + " tokens per CPU-second", flush=True)  # fmt: skip
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    for name, value in measure(parser.parse_args().quick).items():
        print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
