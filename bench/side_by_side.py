"""Timing several ways of doing one thing, in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from treadle.data.batch import Batch
from treadle.models.base import Model
from treadle.ops.memory import keep_freed_memory


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each in every round, A B C A B C, after one turn that warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.process_time()
            for _ in range(repeats):
                way()
            taken[name].append((time.process_time() - begun) / repeats)
    return taken


def medians(ways: dict[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in in_turns(ways, rounds, repeats).items()}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def show(values: dict[str, Any]) -> None:
    """Numbers by name, and the texts that stand where there is no number, as a table."""
    print(f"1 thread, torch {torch.__version__}")
    for name, value in values.items():
        print(f"{name:<72} {value if isinstance(value, str) else f'{value:.4g}'}")


def step_at(model: Model, context: int) -> Callable[[], Any]:
    """Decoding of one token with a state that says `context` tokens were seen."""
    token = Batch.from_ids(torch.zeros(1, 1, dtype=torch.int64))

    def step() -> None:
        with torch.inference_mode():
            model(token, state=state)

    with torch.inference_mode():
        state = model.new_state(1, context + 500)
        state.lengths += context
        state.host_lengths = [context]
    return step


def run(name: str, description: str, parts: Sequence[Callable[[int], None]], rounds: int) -> None:
    """The command line of a file of measurements: each part prints its rows."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", help="one part: " + ", ".join(part.__name__ for part in parts))
    given = parser.parse_args()
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for part in parts:
        if given.only in (None, part.__name__):
            part(given.rounds)
