"""The runs of a sweep, a suite or a folder, and what is written of them: jobs with their states, and the table."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.reporting.run_data import is_run

MOST_RUNS = 400
DEEPEST = 3  # folders below the one that is watched


@dataclass
class Group:
    """members: folder -> label. columns and rows: the table. jobs: what runs, waits, is done or failed. done: None where nothing
    says it."""

    members: dict[Path, str] = field(default_factory=dict)
    metric: str = ""
    columns: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    scaling: list[Any] = field(default_factory=list)
    cost: Any = None
    done: bool | None = None

    def told(self) -> dict[str, Any]:
        return {"metric": self.metric, "columns": self.columns, "rows": self.rows, "jobs": self.jobs, "scaling": self.scaling,
                "cost": self.cost, "done": self.done, "members": len(self.members)}  # fmt: skip


def group_of(root: Path, before: Group | None) -> Group:
    """What the folder says now; what it said before where its file is torn or away. Runs that were seen stay."""
    suite, sweep = _read(root / "suite.json"), _read(root / "sweep.json")
    made = _suite(root, suite) if suite is not None else _sweep(root, sweep) if sweep is not None else None
    if made is None:
        made = Group(**{**vars(before), "members": {}}) if before is not None else Group()
    known = before.members if before is not None else {}
    seen = {path.resolve() for path in made.members}
    for path in _runs_below(root):
        if path.resolve() not in seen:
            made.members[path] = known.get(path) or str(path.relative_to(root))
    made.members = {**known, **made.members}
    return made


def _suite(root: Path, table: dict[str, Any]) -> Group | None:
    try:
        jobs = [{"label": str(job["label"]), "seed": job.get("seed"), "learning_rate": job.get("learning_rate"),
                 "state": str(job.get("state", "")), "folder": _named(root, job), "cpu_seconds": job.get("cpu_seconds")}
                for job in table["jobs"]]  # fmt: skip
        members = {Path(job["folder"]): _label(job) for job in jobs if job["folder"]}
        return Group(members, str(table["metric"]), list(table["columns"]), list(table["rows"]), jobs, list(table.get("scaling") or []),
                     table.get("cost"), bool(table.get("done")))  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError):
        return None  # torn, or of a version that writes otherwise


def _label(job: dict[str, Any]) -> str:
    rate = f" lr {job['learning_rate']:g}" if isinstance(job["learning_rate"], (int, float)) else ""
    return f"{job['label']}{rate} seed {job['seed']}"


def _sweep(root: Path, table: dict[str, Any]) -> Group | None:
    try:
        cells = [{**cell, "label": " ".join(f"{key}={value}" for key, value in cell["point"].items())} for cell in table["cells"]]
        metric = next((str(cell["metric"]) for cell in cells if cell.get("metric")), "")
        points: dict[str, list[dict[str, Any]]] = {}
        for cell in cells:
            points.setdefault(cell["label"], []).append(cell)
        rows = [{"label": label, "cells": {metric: _spread([cell.get("value") for cell in of]),
                                           "cpu_seconds": _spread([cell.get("cpu_seconds") or None for cell in of])}}
                for label, of in points.items()]  # fmt: skip
        jobs = [{"label": cell["label"], "seed": cell.get("seed"), "folder": _named(root, cell), "cpu_seconds": cell.get("cpu_seconds"),
                 "state": "failed" if cell.get("failed") else "done" if cell.get("value") is not None else "waiting",
                 "learning_rate": None} for cell in cells]  # fmt: skip
        lower = all(cell.get("lower_is_better", True) for cell in cells)
        columns = [{"key": metric, "title": metric, "unit": "", "lower_is_better": lower},
                   {"key": "cpu_seconds", "title": "CPU time", "unit": "s", "lower_is_better": True}]  # fmt: skip
        return Group({Path(job["folder"]): f"{job['label']} seed {job['seed']}" for job in jobs if job["folder"]}, metric, columns, rows, jobs)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _spread(values: list[Any]) -> dict[str, Any] | None:
    """Mean, least and most of the numbers among these."""
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return {"mean": statistics.mean(numbers), "low": min(numbers), "high": max(numbers), "values": numbers} if numbers else None


def _named(root: Path, job: dict[str, Any]) -> str:
    """The folder that a job names: as it was written, or beside the table where all of it was moved; "" for none yet."""
    path = Path(str(job.get("folder") or ""))
    if not job.get("folder") or path.is_dir() or path.is_absolute():
        return str(job.get("folder") or "")
    moved = (root.joinpath(*path.parts[start:]) for start in range(len(path.parts)))
    return str(next((inside for inside in moved if inside.is_dir()), path))


def _runs_below(root: Path) -> list[Path]:
    """Folders of runs inside, in order of their names; links are not followed."""
    found: list[Path] = []
    for folder, inner, _ in os.walk(root):
        path = Path(folder)
        if path != root and is_run(path):
            found.append(path)
            inner.clear()
        elif len(path.relative_to(root).parts) >= DEEPEST:
            inner.clear()
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if len(found) >= MOST_RUNS:
            break
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None
