"""The rows of the Collatz tasks beside a pipeline that makes each sample in Python, in turns, by CPU seconds of one thread.

    python -m bench.collatz_data [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.collatz import machine, spread
from treadle.collatz.arithmetic import delay, parities
from treadle.collatz.trajectories import labels
from treadle.collatz_tasks.numbers import NumberSource
from treadle.collatz_tasks.parity import Parities
from treadle.collatz_tasks.settings import ParityKeys

ROWS = 512


def sample(n: int, length: int) -> dict[str, Any]:
    """One number as a dataset's __getitem__ would make it."""
    row = parities(n, length + 1)
    return {"ids": torch.tensor(row[:-1]), "labels": torch.tensor(row[1:]), "steps": torch.tensor(delay(n))}


def rate(way: Callable[[], Any], rows: int) -> float:
    begun = time.process_time()
    way()
    return rows / (time.process_time() - begun)


def measure(length: int, rounds: int) -> None:
    task = ParityKeys(length=length, mixture={"uniform": 1.0})
    data, numbers = Parities(task), NumberSource(task, 0, 0).numbers(np.arange(ROWS))
    exact = [numbers.exact(row) for row in range(64)]
    data.generate(np.arange(ROWS))
    found: dict[str, list[float]] = {name: [] for name in ("labels", "labels, numpy", "whole batches", "python")}
    for round_number in range(rounds):
        found["labels"].append(rate(lambda: [labels(numbers.low, numbers.high, length, True) for _ in range(20)], 20 * ROWS))
        found["labels, numpy"].append(rate(lambda: labels(numbers.low, numbers.high, length, True, "numpy"), ROWS))
        batches = np.split(np.arange(20 * ROWS) + round_number * 20 * ROWS, 20)
        found["whole batches"].append(rate(partial(list, map(data.generate, batches)), 20 * ROWS))
        found["python"].append(rate(lambda: [sample(n, length) for n in exact], len(exact)))
    print(f"rows of {length} parities of n in [2^68, 2^69), samples a CPU second:")
    for name, rates in found.items():
        ratios = [mine / theirs for mine, theirs in zip(rates, found["python"])]
        print(f"  {name:<16} {statistics.median(rates):>12,.0f}   {spread(ratios)} times a sample at a time in Python")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.collatz_data")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; goal: batches at least 5 times")
    for length in (32, 500):
        measure(length, given.rounds)


if __name__ == "__main__":
    main()
