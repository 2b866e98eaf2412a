"""Where the cache is, and replacing a small file so that a reader, or a crash, finds the old one or the new one."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes beside `path`, makes the bytes durable, then moves them into place; text is UTF-8."""
    part = path.with_name(f".{path.name}.part")
    if part.is_symlink():  # in a folder that somebody else made: it would be followed to a file of theirs to choose
        part.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(part, flags, 0o666), "wb") as stream:
        stream.write(data.encode("utf-8") if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time; the others wait. The kernel frees the lock of one that dies."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def shipped(kind: str) -> dict[str, Path]:
    """Name -> file of the built-in TOML files of a kind (recipes, suites): inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    folder = package / kind if (package / kind).is_dir() else package.parent / kind
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def cache_root(configured: str | None) -> Path:
    """Where prepared data, trained tokenizers and compiled C files live."""
    return Path(configured or os.environ.get("TREADLE_CACHE") or Path.home() / ".cache" / "treadle")
