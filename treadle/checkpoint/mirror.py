"""A run's checkpoints copied to object storage while it trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from treadle.checkpoint.copies import claim, copy_there
from treadle.checkpoint.layout import checkpoint_name
from treadle.checkpoint.retention import best_step
from treadle.storage.remote import RemotePath
from treadle.storage.retries import Unreachable


class Mirror:
    """Copies checkpoints one after another in a thread of its own; what goes wrong there never reaches the run but as a warning.

    A checkpoint that comes while another one is copied waits, and a newer one takes its place. warn, emit: told in the thread of whoever
    calls `tell` or `close`.
    """

    def __init__(
        self, place: RemotePath, run: Path, root: Path, logs: Path, keep: int, warn: Callable[[str], None], emit: Callable[..., None]
    ) -> None:
        self.place, self.run, self.root, self.logs, self.keep, self.warn, self.emit = place, run, root, logs, keep, warn, emit
        self.gone_back = False  # later checkpoints there are of a course that was given up
        self._claimed = False
        self._lock = threading.Condition()
        self._waiting: int | None = None
        self._copied: int | None = None  # the step that is being copied
        self._best: int | None = None  # and the best at its beginning
        self._thread: threading.Thread | None = None
        self._news: list[Callable[[], None]] = []

    def begin(self, must: bool) -> None:
        """Makes the place this run's before the first step: ConfigError where it is another's, DataError where it cannot be written.
        One that cannot be reached for the moment is a warning, unless it `must` be."""
        try:
            claim(self.place, self.run)
            self._claimed = True
        except Unreachable as problem:
            if must:
                raise
            self.warn(f"{problem}; it is tried again with the next checkpoint")

    def offer(self, step: int) -> None:
        """This checkpoint is whole on disk."""
        with self._lock:
            self._waiting = step
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="treadle-mirror", daemon=True)
                self._thread.start()

    @property
    def in_use(self) -> set[int]:
        """Steps that rotation has to leave here for a moment."""
        with self._lock:
            return {step for step in (self._copied, self._waiting, self._best) if step is not None}

    def tell(self) -> None:
        """Says what has happened since the last call."""
        with self._lock:
            news, self._news = self._news, []
        for one in news:
            one()

    def close(self, say: Callable[[str], None] | None = None) -> None:
        """Waits until the newest checkpoint is there, or was given up."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            if say is not None:
                say(f"copying the last checkpoint to {self.place} ...")
            thread.join()
        self.tell()

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._waiting is None:
                    self._thread = self._copied = self._best = None
                    return
                step = self._copied = self._waiting
                self._waiting, self._best = None, best_step(self.root)
                gone_back = self.gone_back
            begun = time.monotonic()
            try:
                if not self._claimed:
                    claim(self.place, self.run)
                    self._claimed = True
                remark = copy_there(self.place, self.root, self.logs, step, self.keep, gone_back)
                self.gone_back = False
                seconds = round(time.monotonic() - begun, 3)
                self._say(partial(self.emit, "mirrored", step=step, place=str(self.place), seconds=seconds))
                if remark:
                    self._say(partial(self.warn, f"{checkpoint_name(step)} was copied; older copies could not be removed ({remark})"))
            except Exception as problem:  # a copy may fail in any way, and the run goes on
                self._say(partial(self._failed, step, problem))

    def _say(self, one: Callable[[], None]) -> None:
        with self._lock:
            self._news.append(one)

    def _failed(self, step: int, problem: Exception) -> None:
        reason = "it was removed here meanwhile" if isinstance(problem, FileNotFoundError) else " ".join(str(problem).split())[:500]
        self.emit("mirror_failed", step=step, place=str(self.place), reason=reason)
        self.warn(f"checkpoint {checkpoint_name(step)} was not copied to {self.place} ({reason}); it is whole on disk, training goes on, "
                  "and the next one is tried")  # fmt: skip
