"""What a checkpoint folder looks like: names only, so that writer, reader and retention agree."""

from __future__ import annotations

import os
import re
from pathlib import Path

SCHEMA = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,12})")
_MEMBER = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def safe_member(name: str) -> bool:
    """A file in the checkpoint or one folder down; nothing that could point outside."""
    return bool(_MEMBER.fullmatch(name)) and name != MANIFEST


def parse_step(name: str) -> int | None:
    """The step of a checkpoint's folder name; None for other names."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def steps_in(root: str | Path) -> list[int]:
    """Steps of the checkpoints under `root`, newest first; by number, never by time."""
    if not os.path.isdir(root):
        return []
    return sorted((step for name in os.listdir(root) if (step := parse_step(name)) is not None), reverse=True)
