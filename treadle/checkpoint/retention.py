"""Which checkpoints stay: the newest few, the best one, and pinned ones."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.checkpoint.writer import remove_checkpoint
from treadle.files import write_atomically

BEST_FILE = "best.json"


def mark_best(root: Path, step: int, metrics: dict[str, Any]) -> None:
    """Records which checkpoint is the best and why."""
    table = {"step": step, "checkpoint": checkpoint_name(step), "metrics": metrics}
    write_atomically(root / BEST_FILE, json.dumps(table, indent=1, allow_nan=False) + "\n")


def best_in(mark: bytes | None) -> int | None:
    """The step that the bytes of a best.json name, or None when there are none that can be read."""
    try:
        step = json.loads(mark or b"")["step"]
        return step if isinstance(step, int) else None
    except (ValueError, KeyError, TypeError):
        return None


def best_step(root: Path) -> int | None:
    """The best checkpoint's step, or None when none was marked (or its mark cannot be read)."""
    try:
        return best_in((root / BEST_FILE).read_bytes())
    except OSError:
        return None


def rotate(root: Path, keep: int, spare: Collection[int] = ()) -> None:
    """Deletes all but the `keep` newest checkpoints, the best one and those to `spare`."""
    best = best_step(root)
    for step in steps_in(root)[keep:]:
        if step != best and step not in spare:
            remove_checkpoint(str(root / checkpoint_name(step)))
