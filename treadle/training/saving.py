"""Changes nothing itself: runs one save at a time, at once or while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Saved:
    """The save of a step, and how it ended."""

    step: int
    best: bool = False
    problem: BaseException | None = None


class Saver:
    """Runs a prepared save here, or (asynchronous) in a thread. At most one is in flight; whoever submits waits first."""

    def __init__(self, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None

    def submit(self, save: Saved, job: Callable[[], None]) -> None:
        """Starts a save; the one before has to be over (`wait`)."""
        assert self._thread is None and self._saved is None, "wait for the save before"
        if not self.asynchronous:
            self._run(save, job)
            return
        self._thread = threading.Thread(target=self._run, args=(save, job), name="treadle-save", daemon=True)
        self._thread.start()

    def _run(self, save: Saved, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as problem:  # handed to whoever waits
            save.problem = problem
        self._saved = save

    @property
    def ended(self) -> bool:
        """A save in the background is done and nobody has looked yet."""
        return self._saved is not None

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self._thread is not None and self._saved is None

    def wait(self) -> Saved | None:
        """How the save in flight ended; None when there was none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        saved, self._saved = self._saved, None
        return saved

    def close(self) -> None:
        """Waits for what is in flight, so that a process that ends leaves a whole checkpoint."""
        if self._thread is not None:
            self._thread.join(timeout=60)
