"""Where the cache is, and replacing a small file so that a reader, or a crash, finds the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes beside `path`, makes the bytes durable, then moves them into place; text is UTF-8."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as stream:
        stream.write(data.encode("utf-8") if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def cache_root(configured: str | None) -> Path:
    """Where prepared data, trained tokenizers and compiled C files live."""
    return Path(configured or os.environ.get("TREADLE_CACHE") or Path.home() / ".cache" / "treadle")
