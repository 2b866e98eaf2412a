"""A file that one process at a time appends to: what certificates and the logs of searches are written through."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from treadle.errors import ConfigError, RunLocked


class AppendOnlyFile:
    """Opened (made where it is missing) and locked until `close`; the kernel frees the lock of a process that dies.

    what: the file in words, for its errors. busy: what to do where another process writes, for RunLocked.
    """

    def __init__(self, path: str | Path, what: str, busy: str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except IsADirectoryError as problem:
            raise ConfigError(f"{path} is a folder; name the {what}, a .jsonl file, in it") from problem
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            self.close()
            raise RunLocked(f"another process is writing to {self.path}; {busy}") from problem

    def write(self, data: bytes) -> None:
        """All of it, though not yet durable."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    def truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        """Durable when this returns."""
        os.fsync(self._file)

    @property
    def closed(self) -> bool:
        return self._file < 0

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
            self._file = -1
