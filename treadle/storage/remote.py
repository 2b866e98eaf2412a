"""A file or folder behind a URL, with what treadle needs of pathlib.Path; bytes come through fsspec.

Reading is by ranges: a part that the cache holds is not fetched again, and a range whose parts are missing is one request. What is
fetched belongs to the version that was found when the file was first looked at: a file that changed is an error, never a mixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from treadle.errors import ConfigError, DataError, InputError
from treadle.storage.cache import PART_BYTES, PartCache
from treadle.storage.filesystems import (
    READ_BYTES,
    URL,
    State,
    fetch,
    forget,
    info_of,
    place_to_write,
    state_of,
    system_of,
    under,
)
from treadle.storage.retries import Gone, attempt

ACCOUNTS = ("abfs", "abfss", "az", "adl")  # Azure's URLs have CONTAINER@ACCOUNT
HARMLESS = {"download", "raw", "rev", "ref", "versionid", "revision"}  # what the query of a URL may say
AHEAD_BYTES = 4 << 20  # that are fetched at most while a file is read from front to back


def is_url(place: object) -> bool:
    """Whether this stands for something behind a URL."""
    return isinstance(place, RemotePath) or (isinstance(place, str) and bool(URL.match(place)))


def path_of(place: str | Path | RemotePath, cache: PartCache | None = None) -> AnyPath:
    """A place as an object to read from: a path of this machine, or what a URL stands for."""
    if isinstance(place, (Path, RemotePath)):
        return place
    if place.startswith("file://"):
        return Path(place.removeprefix("file://"))
    return RemotePath(place, cache) if is_url(place) else Path(place)


def refuse_secrets(url: str) -> None:
    """ConfigError for a URL that carries a password or a signature: it would be written down with the run."""
    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    asked = {word.partition("=")[0].lower() for word in re.split("[&;]", parts.query) if word}
    if (at and (":" in user or parts.scheme not in ACCOUNTS)) or asked - HARMLESS or "=" in parts.fragment:
        shown = url.partition("://")[0] + "://" + parts.netloc.rpartition("@")[2] + parts.path
        raise ConfigError(f"the URL of {shown} carries credentials (or a query that may be some), which would be written into the run's "
                          "files; leave them away: credentials are taken from the environment (docs/object_storage.md)")  # fmt: skip


class RemotePath:
    """What a URL stands for. cache: where parts of it are kept; None: the default place."""

    def __init__(self, url: str, cache: PartCache | None = None, known: State | None = None) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        self.cache = cache or PartCache.under(None)
        self._known = known

    # ---- what pathlib has ----

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __hash__(self) -> int:
        return hash((self.url, self._known))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (other.url, other._known) == (self.url, self._known)

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.cache)

    @property
    def _pure(self) -> PurePosixPath:
        return PurePosixPath(self.url.partition("?")[0].partition("://")[2])

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self._pure.name

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return self._pure.stem

    @property
    def suffix(self) -> str:
        """The name's last suffix, with its dot."""
        return self._pure.suffix

    @property
    def suffixes(self) -> list[str]:
        """All suffixes of the name."""
        return self._pure.suffixes

    def resolve(self) -> RemotePath:
        """Itself: a URL is absolute."""
        return self

    def with_suffix(self, suffix: str) -> RemotePath:
        """The URL with another suffix."""
        return RemotePath(self.url[: len(self.url) - len(self.suffix)] + suffix, self.cache)

    def is_file(self) -> bool:
        """Whether a file is there now."""
        if self._known is not None:
            return True
        try:
            found = self._info()
        except Gone:
            return False
        if found["type"] == "file":
            self._known = state_of(found)
        return found["type"] == "file"

    def is_dir(self) -> bool:
        """Whether a folder is there now."""
        try:
            return self._info()["type"] == "directory"
        except Gone:
            return False

    def exists(self) -> bool:
        """Whether anything is there now."""
        return self.is_file() or self.is_dir()

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file as a stream that seeks; reading fetches ranges."""
        assert mode == "rb", mode
        return self.window(0, 0)

    def read_bytes(self) -> bytes:
        """All of it, through the cache."""
        return self.read_range(0, self.state().size)

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of it as text."""
        return self.read_bytes().decode(encoding)

    # ---- what is there ----

    def state(self) -> State:
        """As the file was when it was first looked at. DataError for a folder, and for a file of unknown size."""
        if self._known is None:
            found = self._info()
            if found["type"] != "file":
                raise DataError(f"{self.url} is a folder, not a file")
            self._known = state_of(found)
            if self._known.size < 0:
                raise DataError(f"{self.url}: its server does not tell its size, so it cannot be read in ranges; download it first")
        return self._known

    def files(self) -> list[RemotePath]:
        """All files under a folder, at any depth, in order."""
        def find() -> dict[str, Any]:
            system, path = system_of(self.url)
            return dict(system.find(path, detail=True))

        found = attempt(f"listing {self.url}", find)
        made = []
        for place, info in found.items():
            known = state_of(info)
            if info.get("type") == "file" and not place.endswith("/"):  # a key that ends so marks a folder
                made.append(RemotePath(under(self.url, place), self.cache, known if known.size >= 0 and known.version else None))
        return sorted(made)

    def names(self) -> list[str]:
        """Names of the folders and files directly in a folder; none where there is no such folder."""
        def listed() -> list[str]:
            system, path = system_of(self.url)
            return [str(place) for place in system.ls(path, detail=False)]

        try:
            return sorted({place.rstrip("/").rpartition("/")[2] for place in attempt(f"listing {self.url}", listed)})
        except Gone:
            return []

    def _info(self) -> dict[str, Any]:
        return attempt(f"looking at {self.url}", lambda: info_of(self.url))

    # ---- reading ----

    def window(self, start: int, stop: int) -> BinaryIO:
        """The file as a stream, of which [start, stop) is going to be read: it is fetched as one range."""
        return io.BufferedReader(_Stream(self, start, stop), PART_BYTES)

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file, cut at its end. DataError where they cannot be had, or the file has changed."""
        state = self.state()
        start, stop = max(0, start), min(stop, state.size)
        if start >= stop:
            return b""
        name, first, last = self._cache_name(), start // PART_BYTES, -(-stop // PART_BYTES)
        parts = {number: self.cache.read(name, number) if state.version else None for number in range(first, last)}
        missing = [number for number, part in parts.items() if part is None]
        while missing:
            run = 1
            while run < len(missing) and missing[run] == missing[0] + run:
                run += 1
            begin = missing[0] * PART_BYTES
            data = self._fetch(begin, min(begin + run * PART_BYTES, state.size))
            for n in range(run):
                parts[missing[n]] = part = data[n * PART_BYTES : (n + 1) * PART_BYTES]
                if state.version:  # without one nobody would know that the file has changed
                    self.cache.write(name, missing[n], part)
            missing = missing[run:]
        whole = b"".join(part for part in parts.values() if part is not None)
        return whole[start - first * PART_BYTES : stop - first * PART_BYTES]

    def _cache_name(self) -> str:
        state = self.state()
        return hashlib.sha256(json.dumps([self.url, state.size, state.version]).encode()).hexdigest()[:40]

    def _fetch(self, start: int, stop: int) -> bytes:
        def once() -> bytes:
            try:
                return fetch(self.url, self.state(), start, stop)
            except Exception as problem:
                forget(self.url)  # the next attempt looks at the file again
                if isinstance(problem, ValueError) and "range" in str(problem):
                    raise DataError(f"{self.url}: its server gives no ranges of a file; download it first") from None
                raise

        return attempt(f"reading {self.url}", once)

    # ---- copying and writing ----

    def size_now(self) -> int:
        """Bytes, looked at again. Gone where there is nothing."""
        forget(self.url)
        self._known = None
        return self.state().size

    def read_now(self) -> bytes:
        """All of the file as it is now, past the cache. Gone where there is nothing."""
        size = self.size_now()
        return self._fetch(0, size) if size else b""

    def download(self, to: Path) -> None:
        """All of the file into `to`, past the cache."""
        size = self.state().size
        with to.open("wb") as stream:
            for start in range(0, size, READ_BYTES):
                stream.write(self._fetch(start, min(start + READ_BYTES, size)))
            stream.flush()
            os.fsync(stream.fileno())

    def upload(self, file: Path) -> None:
        """A file of this machine to here. FileNotFoundError where that is gone."""
        if not file.is_file():
            raise FileNotFoundError(str(file))
        self._write(lambda system, path: system.put_file(str(file), path))

    def write_bytes(self, data: bytes) -> None:
        """Writes all of it at once."""
        self._write(lambda system, path: system.pipe_file(path, data))

    def _write(self, put: Callable[[Any, str], None]) -> None:
        forget(self.url)
        self._known = None
        try:
            attempt(f"writing {self.url}", lambda: put(*place_to_write(self.url)))
        except Gone:
            raise DataError(f"{self.url} cannot be written: there is no such bucket or folder; make it first, or name another") from None

    def remove(self) -> None:
        """The file, or the folder with all in it; nothing is no error."""
        def gone() -> None:
            system, path = system_of(self.url)
            system.rm(path, recursive=True)

        forget(self.url)
        try:
            attempt(f"removing {self.url}", gone)
        except Gone:
            return


AnyPath = Path | RemotePath


def state_of_file(file: AnyPath) -> State:
    """Of a remote file as it was when it was first looked at, of one of this machine now (its time of change is its version)."""
    if isinstance(file, RemotePath):
        return file.state()
    now = file.stat()
    return State(now.st_size, str(now.st_mtime_ns))


def size_of(file: AnyPath) -> int:
    """Bytes."""
    return state_of_file(file).size


def local_copy(folder: AnyPath, root: Path) -> Path:
    """A small folder as one of this machine: itself, or its files under `root`, fetched once for each version. InputError for none.
    DataError for names that lead out of it."""
    if isinstance(folder, Path):
        return folder
    files = folder.files()
    if not files:
        raise InputError(f"{folder} holds no file")
    name = hashlib.sha256(json.dumps([[f.url, f.state().size, f.state().version] for f in files]).encode()).hexdigest()[:24]
    final = root / "fetched" / name
    if not final.is_dir():
        part = final.with_name(f".{name}.{uuid.uuid4().hex[:8]}")
        try:
            for file in files:
                place = part / file.url.removeprefix(folder.url + "/")
                if not place.resolve().is_relative_to(part.resolve()):
                    raise DataError(f"{file.url}: a name that points out of its folder")
                place.parent.mkdir(parents=True, exist_ok=True)
                file.download(place)
            with contextlib.suppress(OSError):  # another process was faster: the same files
                part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return final


class _Stream(io.RawIOBase):
    """A remote file as a stream. It holds the range that it fetched last."""

    def __init__(self, path: RemotePath, start: int, stop: int) -> None:
        self.path, self.size, self.at = path, path.state().size, 0
        self.start, self.stop = start, stop
        self.held, self.held_from, self.ahead = b"", -1, PART_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        if not self.held_from <= self.at < self.held_from + len(self.held):
            inside, onward = self.start <= self.at < self.stop, self.at == self.held_from + len(self.held)
            self.ahead = min(2 * self.ahead, AHEAD_BYTES) if onward else PART_BYTES
            begin = self.at // PART_BYTES * PART_BYTES
            begin, end = (self.start, self.stop) if inside else (begin, self.at + max(len(buffer), self.ahead))
            self.held, self.held_from = self.path.read_range(begin, end), begin
        part = memoryview(self.held)[self.at - self.held_from :][: len(buffer)]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)

    def readall(self) -> bytes:
        data = self.path.read_range(self.at, self.size)
        self.at += len(data)
        return data
