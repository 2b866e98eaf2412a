"""Whose processor this is, where that decides what pays."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def made_by_amd() -> bool:
    """Linux says it; elsewhere nobody does, and the answer is no."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")[:4096]
    except OSError:
        return False
