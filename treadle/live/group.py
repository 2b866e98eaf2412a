"""The runs of a sweep, a suite or a folder, and what is written of them: jobs with their states, and the table."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.reporting.run_data import is_run, json_table, run_in
from treadle.reporting.tables import point_of, suite_board, sweep_board

MOST_RUNS = 400
COLOURS = 7  # of page.css (charts.js says the same); every seven further, lines have other dashes
DEEPEST = 3  # folders below the one that is watched


@dataclass
class Group:
    """members: folder -> label. board: the table, as reporting/tables.py says. jobs: what runs, waits, is done or failed. done: None
    where nothing says it."""

    members: dict[Path, str] = field(default_factory=dict)
    metric: str = ""
    board: dict[str, Any] | None = None
    jobs: list[dict[str, Any]] = field(default_factory=list)
    cpu_seconds: float | None = None
    done: bool | None = None

    def told(self) -> dict[str, Any]:
        return {"metric": self.metric, "board": self.board, "jobs": self.jobs, "cpu_seconds": self.cpu_seconds, "done": self.done}


def group_of(root: Path, before: Group | None) -> Group:
    """What the folder says now; what it said before where its file is torn or away. Runs that were seen stay."""
    suite, sweep = json_table(root / "suite.json"), json_table(root / "sweep.json")
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
        jobs = [{"label": str(job["label"]), "kind": str(job.get("kind", "run")), "state": str(job["state"]), "folder": _named(root, job), "cpu_seconds": job.get("cpu_seconds"),
                 "problem": str(job.get("problem") or "")} for job in table["jobs"]]  # fmt: skip
        board, cost = suite_board(table), table.get("cost") or {}
        sizes = len({row.get("size") for row in table["rows"]}) > 1
        entries = [f"{row['label']} {row['size']}" if sizes else row["label"] for row in table["rows"]]
        _colour(jobs, [job["label"].rpartition(", ")[0] for job in jobs], entries)
        return Group(_members(jobs), str(table["metric"]), board, jobs, cost.get("cpu_seconds"), bool(table.get("done")))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        return None  # torn, or of a version that writes otherwise


def _sweep(root: Path, table: dict[str, Any]) -> Group | None:
    try:
        jobs = [{"label": f"{point_of(cell)} · seed {cell.get('seed')}", "kind": "run",
                 "state": "failed" if cell.get("failed") else "done" if cell.get("value") is not None else str(cell.get("state", "waiting")),
                 "folder": _named(root, cell), "cpu_seconds": cell.get("cpu_seconds"),
                 "problem": str(cell.get("failed") or "")} for cell in table["cells"]]  # fmt: skip
        metric = next((str(cell["metric"]) for cell in table["cells"] if cell.get("metric")), "")
        spent, board = sum(float(job["cpu_seconds"] or 0) for job in jobs), sweep_board(table, root)
        points = [point_of(cell) for cell in table["cells"]]
        order = list(dict.fromkeys(points))  # of the grid, and not by rank, which changes while one looks
        _colour(jobs, points, order)
        for row in [*board["rows"], *board["bars"]["rows"]]:
            row["colour"] = order.index(row["label"])
        return Group(_members(jobs), metric, board, jobs, spent)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        return None


def _colour(jobs: list[dict[str, Any]], names: list[str], entries: list[str]) -> None:
    """Jobs of one entry in the colour of its row of the table: its number among the entries. Its second and third are drawn with
    other dashes."""
    before: dict[str, int] = {}
    for job, name in zip(jobs, names):
        if name in entries:
            kind = f"{name} {job['kind']}"
            job["colour"] = entries.index(name) % COLOURS + COLOURS * before.get(kind, 0)
            before[kind] = before.get(kind, 0) + 1


def _members(jobs: list[dict[str, Any]]) -> dict[Path, str]:
    return {Path(job["folder"]): job["label"] for job in jobs if job["folder"]}


def _named(root: Path, job: dict[str, Any]) -> str:
    """The folder that a job names: where run_in finds it, as it was written where nothing is there yet; "" for none."""
    written = str(job.get("folder") or "")
    return str(run_in(root, written) or Path(written)) if written else ""


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
