"""Batches ahead of the step, fetched by a background thread.

What is saved is the position of what the step has received, never of what was fetched ahead.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from treadle.data.base import BatchPlan, Dataset, Position
from treadle.data.batch import Batch

Item = tuple[list[Batch], Position]


class Loader:
    """Iterates over (micro-batches, position after them) from `position` on, for plan.steps steps, measuring how long the
    step waits for data.

    While it waits it calls `idle` several times a second; when that returns true the iteration ends.
    """

    def __init__(
        self, dataset: Dataset, position: Position, plan: BatchPlan, *, pin: bool = False,
        idle: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.dataset, self.position, self.plan, self.pin, self.idle = dataset, position, plan, pin, idle
        self.steps = 0  # handed out so far
        self.waited = self.computed = 0.0  # seconds spent waiting here, and (told by the trainer) between two waits
        self._feeder: _Feeder | None = None

    def __iter__(self) -> Iterator[Item]:
        source = itertools.islice(self.dataset.batches(self.position, self.plan), self.plan.steps)
        self._feeder = _Feeder(source, 1 if self.plan.workers else self.plan.prefetch, self.pin)
        while True:
            begun = time.perf_counter()
            item = self._feeder.next(self.idle)
            self.waited += time.perf_counter() - begun
            if item is None:
                return
            self.steps += 1
            yield item

    def wait_share(self) -> float:
        """Share of the time so far that went into waiting for data."""
        return self.waited / max(1e-9, self.waited + self.computed)

    def close(self) -> None:
        """Stops the thread and the workers."""
        if self._feeder is not None:
            self._feeder.close()
        self._feeder = None


class _Feeder:
    """One daemon thread that fills a bounded queue; an error in it surfaces at the step that needed the batch."""

    def __init__(self, source: Iterator[Item], depth: int, pin: bool) -> None:
        self.source, self.pin = source, pin
        self.queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="treadle-data", daemon=True)
        self.thread.start()

    def _put(self, item: Any) -> None:
        while not self.stopped.is_set():
            try:
                self.queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            for made, position in self.source:
                if self.stopped.is_set():
                    return
                self._put(([b.pin() for b in made] if self.pin else made, position))
            self._put(None)
        except BaseException as problem:  # handed to the training thread
            self._put(problem)

    def next(self, idle: Callable[[], bool]) -> Item | None:
        """The next item; None at the end, or when `idle` asks to stop while there is none."""
        while True:
            try:
                item = self.queue.get(timeout=0.2)
            except queue.Empty:
                if idle():
                    return None
                continue
            if isinstance(item, BaseException):
                raise item
            return item

    def close(self) -> None:
        self.stopped.set()
        while True:
            try:
                self.queue.get_nowait()
            except queue.Empty:
                break
        self.thread.join(timeout=5)
        self.source = iter(())  # lets go of worker processes
