"""Small texts by name that the processes of one machine leave for each other: a file each, in a folder of the launch.

They outlive the process that wrote them, so that the others still learn why it ended, and no port is open for them. The
methods are those of a torch.distributed store that meeting.py and heartbeat.py use; nothing here imports torch.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path

FOLDER = "TREADLE_MEETING"  # the folder in which the processes of `--devices N` meet
WORD = "treadle/word"  # why a process ended, from itself or from the launcher
GONE = (RuntimeError, OSError)  # what a store, or a folder, raises when it went with its process


@contextmanager
def meeting_folder(environ: MutableMapping[str, str]) -> Iterator[Path]:
    """A folder of its own for one launch, named in `environ`; removed when all have ended."""
    with tempfile.TemporaryDirectory(prefix="treadle-", ignore_cleanup_errors=True) as folder:
        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_SH)  # what cleans a temporary folder of old files leaves locked ones alone
        environ[FOLDER] = folder
        try:
            yield Path(folder)
        finally:
            os.close(held)


def taken_folder(environ: MutableMapping[str, str] = os.environ) -> Path | None:
    """The folder this process was given. It is taken out of the environment: what this process starts meets elsewhere."""
    folder = environ.pop(FOLDER, None)
    return Path(folder) if folder else None


class Notes:
    """The texts in `folder`. A reader sees a whole text or none; OSError when the folder is gone."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _path(self, key: str) -> Path:
        return self.folder / key.replace("/", "-")

    def _written(self, key: str, text: str) -> Path:
        beside = self.folder / f".{key.replace('/', '-')}.{os.getpid()}.{threading.get_ident()}"
        beside.write_text(text, encoding="utf-8")
        return beside

    def set(self, key: str, text: str) -> None:
        """Writes a text; one of equal length over the one before, which costs no new file."""
        try:
            with self._path(key).open("r+b") as stream:
                if os.fstat(stream.fileno()).st_size == len(text.encode()):
                    stream.write(text.encode())  # in place: a counter goes on where the disk is full
                    return
        except FileNotFoundError:
            pass
        self._written(key, text).replace(self._path(key))

    def get(self, key: str) -> bytes:
        """Reads a text; FileNotFoundError where there is none yet."""
        return self._path(key).read_bytes()

    def check(self, keys: Sequence[str]) -> bool:
        """All of them are there."""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is gone")
        return all(self._path(key).exists() for key in keys)

    def compare_set(self, key: str, expected: str, text: str) -> bytes:
        """Writes `text` where nothing is there yet (expected is ""); returns what is there then."""
        beside = self._written(key, text)
        try:
            os.link(beside, self._path(key))
        except FileExistsError:
            pass
        finally:
            beside.unlink()
        return self.get(key)
