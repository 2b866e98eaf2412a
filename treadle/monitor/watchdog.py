"""A step that never ends: dump every thread's stack to a file and exit, so that a cluster can start the run again."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path

HANG_CODE = 75


class Watchdog:
    """Armed while a step computes; waiting for data, evaluating and saving do not count."""

    def __init__(self, seconds: float | None, folder: Path, rank: int = 0) -> None:
        self.seconds, self.folder, self.rank = seconds, folder, rank
        self._since: float | None = None
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        if self.seconds is not None:
            threading.Thread(target=self._watch, name="treadle-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def begin(self) -> None:
        """A step begins to compute."""
        self._since = time.monotonic()

    def end(self) -> None:
        """It has ended, or waits for something that may take long."""
        self._since = None

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._closed.wait(min(1.0, self.seconds / 4)):
            since = self._since
            if since is not None and time.monotonic() - since > self.seconds:
                path = self.folder / ("stacks.txt" if self.rank == 0 else f"stacks-rank{self.rank}.txt")
                with path.open("w", encoding="utf-8") as stream:
                    stream.write(f"a step took longer than {self.seconds} s; the stacks of all threads:\n\n")
                    stream.flush()
                    faulthandler.dump_traceback(stream, all_threads=True)
                message = (
                    f"error: a step took longer than step_timeout = {self.seconds} s; stacks are in {path}. The last "
                )
                os.write(2, (message + "checkpoint is intact; the same command continues\n").encode())
                os._exit(HANG_CODE)
