"""Which checkpoints stay: the newest few, the best one, those that other runs are built on, and pinned ones."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.checkpoint.writer import remove_checkpoint
from treadle.files import write_atomically

BEST_FILE = "best.json"
USED_FILE = "used_by.json"  # beside the checkpoints: name of a checkpoint -> folders of the runs that need its weights


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


def keep_for(checkpoint: Path, run: Path) -> None:
    """A checkpoint of a run stays while the folder `run`, which needs its weights (the frozen model of adapters, a reference), is
    there. A folder that no rotation touches stays as it is."""
    root = checkpoint.parent
    if checkpoint.name not in map(checkpoint_name, steps_in(root)) or root.resolve().parent == run.resolve():
        return
    table = _used(root)
    if str(run.resolve()) not in table.get(checkpoint.name, []):
        table.setdefault(checkpoint.name, []).append(str(run.resolve()))
        write_atomically(root / USED_FILE, json.dumps(table, indent=1) + "\n")


def _used(root: Path) -> dict[str, list[str]]:
    """The file as it is; nothing where there is none, or none that can be read."""
    try:
        table = json.loads((root / USED_FILE).read_bytes())
        return {str(name): [str(run) for run in runs] for name, runs in table.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def rotate(root: Path, keep: int, spare: Collection[int] = ()) -> None:
    """Deletes all but the `keep` newest checkpoints, the best one, those that other runs need and those to `spare`."""
    best, used = best_step(root), {name for name, runs in _used(root).items() if any(Path(run).is_dir() for run in runs)}
    for step in steps_in(root)[keep:]:
        if step != best and step not in spare and checkpoint_name(step) not in used:
            remove_checkpoint(str(root / checkpoint_name(step)))
