"""Parts of remote files kept on this machine's disk, in bounded space and with checksums.

A file is cut into parts of PART_BYTES; each is kept under the file's URL and version, so that a file that changes is another one.
Processes share the folder: writing is atomic, and a damaged part is as if it were not there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import uuid
from pathlib import Path

from treadle.files import cache_root

PART_BYTES = 1 << 16  # little enough that a block of 256 kB is fetched with few bytes it has no use for
DEFAULT_BYTES = 20 * 10**9
_DIGEST = 32


class PartCache:
    """folder: where; limit: bytes that it takes at most, 0: it keeps nothing.

    Each process that adds looks after 1/64 of the limit that it added, and removes what was used longest ago down to 7/8 of it; so
    eight processes stay under it.
    """

    def __init__(self, folder: Path, limit: int = DEFAULT_BYTES) -> None:
        self.folder, self.limit = folder, limit
        self._added = limit  # since the last look: the first addition looks

    @staticmethod
    def under(cache_dir: str | None, limit: int = DEFAULT_BYTES) -> PartCache:
        """The one of this process in this place."""
        return _shared(cache_root(cache_dir) / "remote", limit)

    def read(self, name: str, number: int) -> bytes | None:
        """Part `number` of the file called `name`, or None."""
        if not self.limit:
            return None
        path = self._path(name, number)
        try:
            kept = path.read_bytes()
        except OSError:
            return None
        digest, data = kept[:_DIGEST], kept[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return data

    def write(self, name: str, number: int, data: bytes) -> None:
        """Keeps a part; a full or read-only disk is no error."""
        if not self.limit:
            return
        path = self._path(name, number)
        part = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(hashlib.sha256(data).digest() + data)
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            return
        self._added += len(data)
        if self._added > self.limit // 64:
            self._added = 0
            self._shrink()

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name[:2] / name / str(number)

    def _shrink(self) -> None:
        found = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    now = os.stat(path)
                    found.append((now.st_mtime_ns, now.st_size, path))
        total, most = sum(size for _, size, _ in found), self.limit * 7 // 8
        if total <= most:
            return
        for _, size, path in sorted(found):
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size
            if total <= most * 7 // 8:
                break
        for folder, folders, names in os.walk(self.folder, topdown=False):
            if not folders and not names and folder != str(self.folder):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


@functools.cache
def _shared(folder: Path, limit: int) -> PartCache:
    return PartCache(folder, limit)
