"""Batches ahead of the step, in a background thread or in worker processes.

Items are step numbers, so there is no state to save: any number of workers, any prefetch depth and any restart give
the same batches.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from treadle.data.batch import Batch
from treadle.data.dataset import Dataset
from treadle.data.order import Order, step_draws
from treadle.processes import end_with_parent


class StepBatches(TorchDataset):
    """step -> the micro-batches of one rank: a list of `accumulation` batches."""

    def __init__(
        self, dataset: Dataset, order: Order, global_batch: int, accumulation: int, rank: int = 0, world: int = 1
    ) -> None:
        self.dataset, self.order = dataset, order
        self.global_batch, self.accumulation, self.rank, self.world = global_batch, accumulation, rank, world

    def __getitem__(self, step: int) -> list[Batch]:
        source, row = self.order.draws(step_draws(step, self.global_batch, self.rank, self.world))
        micro = len(row) // self.accumulation
        return [self.dataset.batch(source[i : i + micro], row[i : i + micro]) for i in range(0, len(row), micro)]

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        """(source, row) of each sample of a step, for reports."""
        source, row = self.order.draws(step_draws(step, self.global_batch, self.rank, self.world))
        return list(zip(source.tolist(), row.tolist()))


def _die_with_parent(worker: int) -> None:
    """No worker outlives a killed training. Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)


class Loader:
    """Iterates over (step, micro-batches) from `start` to `stop`, measuring how long the step waits for data.

    While it waits it calls `idle` several times a second; when that returns true the iteration ends.
    """

    def __init__(
        self,
        batches: StepBatches,
        start: int,
        stop: int,
        *,
        workers: int = 0,
        prefetch: int = 4,
        pin: bool = False,
        idle: Callable[[], bool] = lambda: False,
    ) -> None:
        self.batches, self.start, self.stop = batches, start, stop
        self.workers, self.prefetch, self.pin, self.idle = workers, prefetch, pin, idle
        self.waited = self.computed = 0.0  # seconds spent waiting here, and (told by the trainer) between two waits
        self._feeder: _Feeder | None = None

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        source = self._processes() if self.workers else (self.batches[step] for step in range(self.start, self.stop))
        self._feeder = _Feeder(source, 1 if self.workers else self.prefetch, self.pin)
        step = self.start
        while True:
            begun = time.perf_counter()
            micro_batches = self._feeder.next(self.idle)
            self.waited += time.perf_counter() - begun
            if micro_batches is None:
                return
            yield step, micro_batches
            step += 1

    def _processes(self) -> Iterator[list[Batch]]:
        loader = DataLoader(
            self.batches, batch_size=None, sampler=range(self.start, self.stop), num_workers=self.workers,
            prefetch_factor=self.prefetch, pin_memory=False, multiprocessing_context="fork",
            worker_init_fn=_die_with_parent,
            generator=torch.Generator(),  # workers draw their base seed from here, not from the model's generator
        )  # fmt: skip
        return iter(loader)

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

    def __init__(self, source: Iterator[list[Batch]], depth: int, pin: bool) -> None:
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
            for made in self.source:
                if self.stopped.is_set():
                    return
                self._put([b.pin() for b in made] if self.pin else made)
            self._put(None)
        except BaseException as problem:  # handed to the training thread
            self._put(problem)

    def next(self, idle: Callable[[], bool]) -> list[Batch] | None:
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
