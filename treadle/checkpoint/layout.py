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
    return f"step-{step:08d}"


def safe_member(name: str) -> bool:
    """A file in the checkpoint or one folder down; nothing that could point outside."""
    return bool(_MEMBER.fullmatch(name)) and name != MANIFEST


def steps_in(root: str | Path) -> list[int]:
    """Steps of the checkpoints under `root`, newest first; by number, never by time."""
    if not os.path.isdir(root):
        return []
    found = (_STEP.fullmatch(name) for name in os.listdir(root))
    return sorted((int(match[1]) for match in found if match), reverse=True)
