"""What a page follows: one run, or the runs of a sweep, of a suite or of a folder, with the table that comes of them."""

from __future__ import annotations

import secrets
import threading
import time
from pathlib import Path
from typing import Any

from treadle.errors import InputError
from treadle.live.followed import Followed
from treadle.live.group import Group, group_of
from treadle.reporting.run_data import is_run

FRESH = 0.4  # seconds that what was read counts as new: several tabs read the disk once
MOST_ROWS = 6000  # of all runs together; a screen has fewer points
FEWEST_ROWS = 200
# Columns that are kept of each of several runs.
SHARED = ("loss", "bpb", "accuracy", "learning_rate", "grad_norm", "tokens_per_second", "memory_gb", "seconds",
          "tokens")  # fmt: skip


class Watched:
    """Reads a folder when somebody asks, at most every FRESH seconds, for any number of tabs and threads."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self._kind = kind_of(folder)
        self._lock = threading.Lock()
        self._session, self._moment, self._until = secrets.token_hex(4), 0, 0.0
        self._runs: dict[Path, Followed] = {}
        self._group: Group | None = None
        self._group_changed = 0

    def folder(self, number: int) -> Path | None:
        """The folder of a run by its number in the answers."""
        with self._lock:
            return next((run.folder for run in self._runs.values() if run.number == number), None)

    def news(self, since: str = "") -> dict[str, Any]:
        """What is new since an answer's "cursor"; anything else for a cursor gives everything."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._refresh()
                self._until = time.monotonic() + FRESH
            session, _, known = since.partition("-")
            last = int(known) if session == self._session and known.isascii() and known.isdigit() and len(known) < 16 else 0
            runs = [told for run in self._runs.values() if (told := run.news(last)) is not None]
            group = self._group.told() if self._group is not None and self._group_changed > last else None
            return {"kind": self._kind, "name": self.root.resolve().name, "path": str(self.root), "cursor": f"{self._session}-{self._moment}",
                    "whole": last == 0, "count": len(self._runs), "runs": runs, "group": group}  # fmt: skip

    def _refresh(self) -> None:
        self._moment += 1
        now = kind_of(self.root)  # a sweep and a suite write their table when their first run has begun
        if now != self._kind and now != "folder":  # a run whose folder is away for a while stays a run
            if "run" in (now, self._kind):
                self._runs, self._group, self._session = {}, None, secrets.token_hex(4)  # whoever asked before learns everything anew
            self._kind = now
        if self._kind == "run":
            members = {self.root: self.root.resolve().name}
        else:
            before, self._group = self._group, group_of(self.root, self._group)
            if before is None or before.told() != self._group.told():
                self._group_changed = self._moment
            members = self._group.members
        for path, label in members.items():
            if path not in self._runs:
                alone = self._kind == "run"
                rows = MOST_ROWS if alone else max(FEWEST_ROWS, MOST_ROWS * 4 // len(members))
                self._runs[path] = Followed(path, len(self._runs), rows, None if alone else SHARED)
            self._runs[path].called(label, self._moment)
        for run in self._runs.values():
            run.refresh(self._moment)


def kind_of(folder: Path) -> str:
    """run, suite, sweep or folder."""
    for name in ("suite", "sweep"):
        if (folder / f"{name}.json").is_file():
            return name
    return "run" if is_run(folder) or (folder / "LOCK").is_file() else "folder"


def found(name: str) -> Path:
    """What somebody named on the command line -> its folder; `last` is the newest in runs/. InputError where nothing is."""
    folder = Path(name)
    known = sorted((path for path in Path("runs").glob("*") if path.is_dir()), key=_newest, reverse=True) if Path("runs").is_dir() else []
    if name == "last" and not folder.exists():
        if not known:
            raise InputError("there is nothing in runs/ yet; train something: treadle train")
        return known[0]
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file; give the folder of a run, a sweep or a suite")
    there = ", ".join(str(path) for path in known[:10])
    raise InputError(f"{folder} does not exist; " + (f"there is: {there}" if there else "start it first: treadle train"))


def _newest(folder: Path) -> float:
    return max((path.stat().st_mtime for path in (*folder.glob("*.jsonl"), *folder.glob("*.json"), folder / "LOCK") if path.exists()), default=0.0)
