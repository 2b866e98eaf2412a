"""fsspec's file systems as treadle uses them: what is there, told by size and version, and open files to read ranges from."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from treadle.errors import ConfigError, DataError, MissingExtra

VERSION_KEYS = ("ETag", "etag", "md5Hash", "blob_id", "Content-MD5", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created")
LOOKED_AT = 60.0  # seconds after which a file that is read is looked at again
MOST_HANDLES = 256  # of a thread
READ_BYTES = 8 << 20
BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "az", "adl", "hf", "oss", "r2")  # what is before :// of stores without folders
CONDITIONAL = ("s3", "s3a")  # whose requests name the version (If-Match), so that no look is needed after them
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class State:
    """What tells whether a file is the same: its size, and its ETag, checksum or time, whatever its server gives first."""

    size: int
    version: str


def system_of(url: str) -> tuple[Any, str]:
    """(file system, path in it). MissingExtra without the packages; ConfigError for a URL that nothing reads."""
    try:
        import fsspec
    except ImportError:
        raise MissingExtra(f"{url.partition('://')[0]}:// (object storage)", "remote") from None
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as problem:
        if url.startswith("s3"):
            raise MissingExtra(f"{url.partition('://')[0]}:// (object storage)", "remote") from None
        raise ConfigError(f"{url}: {problem}") from None
    except ValueError as problem:
        raise ConfigError(f"{url}: {problem}; known are s3://, gs://, hf://, http(s):// and others of fsspec") from None


def place_to_write(url: str) -> tuple[Any, str]:
    """`system_of`, with the folder made where there are folders. A bucket is never made: a mistyped one would be."""
    system, path = system_of(url)
    if url.partition("://")[0] not in BUCKETS:
        system.makedirs(system._parent(path), exist_ok=True)
    return system, path


def state_of(info: dict[str, Any]) -> State:
    """Size and version of a file, from what a file system says of it."""
    size = info.get("size")
    version = next((info[key] for key in VERSION_KEYS if info.get(key)), "")
    if isinstance(version, datetime):  # as listings say it where a file by itself says seconds
        version = version.timestamp()
    return State(-1 if size is None else int(size), str(version))


def under(folder: str, found: str) -> str:
    """The URL of a file that the listing of `folder` calls `found`. DataError for a name that would be another place on a disk."""
    system, path = system_of(folder)
    root = str(system._strip_protocol(path)).rstrip("/") + "/"
    name = str(system._strip_protocol(found))
    inside = name.removeprefix(root)
    if not name.startswith(root) or any(part in ("", ".", "..") for part in inside.split("/")) or "\\" in inside or "\0" in inside:
        raise DataError(f"{folder} holds an object whose name is no file's: {found!r}; remove it, or name the files that are wanted")
    return f"{folder}/{inside}"


_local = threading.local()


def _handles() -> OrderedDict[tuple[str, State], tuple[float, Any]]:
    """Open files of this thread; a child process has none of its parent's."""
    if getattr(_local, "process", None) != os.getpid():
        _local.process, _local.handles = os.getpid(), OrderedDict()
    return _local.handles


def forget(url: str) -> None:
    """Closes what is known of a URL, after it was written."""
    for key in [key for key in _handles() if key[0] == url]:
        del _handles()[key]


def info_of(url: str) -> dict[str, Any]:
    """What is at a URL, as fsspec tells it. FileNotFoundError where nothing is."""
    system, path = system_of(url)
    return dict(system.info(path))


def refuse_change(url: str, known: State, now: State) -> None:
    """DataError when a file is not what it was when it was first looked at."""
    if now != known:
        what = f"size {known.size} -> {now.size}" if known.size != now.size else f"version {known.version} -> {now.version}"
        raise DataError(f"{url} was changed while it was read ({what}); the order of a run holds only for the data it was started with")


def fetch(url: str, known: State, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of the file as it was known. DataError where it is another one."""
    handles = _handles()
    since, handle = handles.get((url, known), (0.0, None))
    if handle is None or time.monotonic() - since > LOOKED_AT:
        system, path = system_of(url)
        handle = system.open(path, "rb", cache_type="none", block_size=READ_BYTES)
        if state_of(getattr(handle, "details", None) or {}) != known:  # not every file system says the same of an open file
            refuse_change(url, known, state_of(info_of(url)))
        if not handle.seekable():
            raise DataError(f"{url}: its server gives no ranges of a file; download it first")
        handles[url, known] = time.monotonic(), handle
        if len(handles) > MOST_HANDLES:
            handles.popitem(last=False)
    handles.move_to_end((url, known))
    handle.seek(start)
    data = bytes(handle.read(stop - start))
    if url.partition("://")[0] not in CONDITIONAL:
        refuse_change(url, known, state_of(info_of(url)))
    if len(data) != stop - start:
        raise ConnectionError(f"{len(data)} of {stop - start} bytes arrived")
    return data
