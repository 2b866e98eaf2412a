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
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class State:
    """What tells whether a file is the same: its size, and its ETag, checksum or time, whatever its server gives first."""

    size: int
    version: str


def system_of(url: str) -> tuple[Any, str]:
    """(file system, path in it)."""
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
    size = info.get("size")
    version = next((info[key] for key in VERSION_KEYS if info.get(key)), "")
    if isinstance(version, datetime):  # as listings say it where a file by itself says seconds
        version = version.timestamp()
    return State(-1 if size is None else int(size), str(version))


def joined(folder: str, found: str) -> str:
    """The URL of what a listing of `folder` calls `found`, which most file systems give without the protocol."""
    if URL.match(found):
        return found
    protocol = folder.partition("://")[0]
    return f"{protocol}://{found.lstrip('/')}" if protocol != "memory" else f"memory://{found}".replace(":///", "://")


_local = threading.local()


def _handles() -> OrderedDict[str, tuple[float, Any]]:
    """Open files of this thread; a child process has none of its parent's."""
    if getattr(_local, "process", None) != os.getpid():
        _local.process, _local.handles = os.getpid(), OrderedDict()
    return _local.handles


def forget(url: str) -> None:
    _handles().pop(url, None)


def handle_of(url: str, known: State) -> Any:
    """An open file, looked at in the last minute. DataError where it is not the file that was known."""
    handles = _handles()
    since, handle = handles.get(url, (0.0, None))
    if handle is not None and time.monotonic() - since < LOOKED_AT:
        handles.move_to_end(url)
        return handle
    system, path = system_of(url)
    handle = system.open(path, "rb", cache_type="none", block_size=READ_BYTES)
    now = state_of(getattr(handle, "details", None) or {})
    if now != known:  # not every file system says the same of an open file
        now = state_of(dict(system.info(path)))
    if now != known:
        what = f"size {known.size} -> {now.size}" if known.size != now.size else f"version {known.version} -> {now.version}"
        raise DataError(f"{url} was changed while it was read ({what}); the order of a run holds only for the data it was started with")
    if not handle.seekable():
        raise DataError(f"{url}: its server gives no ranges of a file; download it first")
    handles[url] = time.monotonic(), handle
    if len(handles) > MOST_HANDLES:
        handles.popitem(last=False)
    return handle
