"""What the folder of one run says, as plain JSON: curves, evaluations, samples, events, settings, how it ended. No torch.

A page reads a run that is being trained again and again: `since` takes the "offsets" of the answer before, and only what is
new comes back. A last line that is still being written is left for the next time.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import tomllib
from pathlib import Path
from typing import Any

from treadle.errors import InputError
from treadle.reporting.thinning import spread

LONGEST_SAMPLE = 20_000  # characters of one sample
MOST_SAMPLES = 40
WARM = 3  # rows of the log that the speed leaves out: compiling, the first reading of data


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run, finished or not."""
    return (folder / "config.toml").is_file() or (folder / "metrics.jsonl").is_file()


def run_in(root: Path, place: str) -> Path | None:
    """The run that the table of the sweep or suite in `root` names: where the table says, or, where all of it was moved, as it lies below
    `root` (the longest end of its name that is there). A folder that is no run yet where there is no better one, None for neither."""
    parts = Path(place).parts
    places = [Path(place), *(root.joinpath(*parts[start:]) for start in range(len(parts)))]
    return next((path for path in places if is_run(path)), None) or next((path for path in places if path.is_dir()), None)


def read_run(folder: Path, since: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything that a page needs of one run. "columns" has, for each column of the log, one value for each of "steps" (None
    where there is none); "restarted" says that what was read with `since` is no longer there (a resumed run rewrites its log),
    so that all of it is read anew. InputError for a folder that is no run."""
    if not is_run(folder):
        raise InputError(f"{folder} is no run: it has no config.toml; runs lie in runs/, and treadle train makes one")
    tables = tables_of(folder)
    logs = Path(directory) if (directory := tables.get("log", {}).get("log_dir")) else folder
    before = since or {}
    rows, metrics_at, fresh_metrics = _rows(logs, before.get("metrics"))
    events, events_at, fresh_events = _lines(folder / "events.jsonl", before.get("events"))
    samples, samples_at = _samples(logs / "samples", -1 if fresh_metrics else before.get("samples", -1))
    steps, columns = columns_of([row for row in rows if "split" not in row])
    evaluations = [row for row in rows if "split" in row]
    size = bytes_per_token(evaluations) or before.get("bytes_per_token")
    plan = next((event["plan"] for event in reversed(events) if isinstance(event.get("plan"), dict)), before.get("plan"))
    return {
        "name": str(tables.get("run", {}).get("run_name") or folder.resolve().name),
        "folder": str(folder),
        "config": flat(tables),
        "steps": steps,
        "columns": columns,
        "evals": evaluations,
        "bytes_per_token": size,
        "samples": samples,
        "events": events,
        "summary": json_table(folder / "summary.json"),
        "environment": json_table(folder / "environment.json"),
        "plan": plan,
        "restarted": bool(since) and (fresh_metrics or fresh_events),
        "offsets": {"metrics": metrics_at, "events": events_at, "samples": samples_at, "bytes_per_token": size, "plan": plan},
    }


def flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"arch": "hnet"}} -> {"model.arch": "hnet"}."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def columns_of(rows: list[dict[str, Any]]) -> tuple[list[int], dict[str, list[Any]]]:
    """Rows of the log -> their steps, and each of their numbers by name."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    return [int(row["step"]) for row in rows], {name: [_number(row.get(name)) for row in rows] for name in names}


def bytes_per_token(evaluations: list[dict[str, Any]]) -> float | None:
    """UTF-8 bytes that a token stands for in the held-out text; None for data that is no text."""
    for row in reversed(evaluations):
        size, labels = row.get("bytes"), row.get("labels")
        if isinstance(size, (int, float)) and isinstance(labels, (int, float)) and size > 0 and labels > 0:
            return size / labels
    return None


def measured(run: dict[str, Any]) -> dict[str, float | None]:
    """What the log says: the median speed, seconds of a step from it, all seconds, and the most memory."""
    columns, summary = run["columns"], run["summary"] or {}
    speeds = [value for value in columns.get("tokens_per_second", []) if value]
    steady = speeds[WARM:] or speeds
    rate = statistics.median(steady) if steady else None
    tokens, steps = [value for value in columns.get("tokens", []) if value], run["steps"]
    each = tokens[-1] / steps[-1] if tokens and steps and steps[-1] else None
    seconds = [value for value in columns.get("seconds", []) if value is not None]
    memory = [value for value in columns.get("memory_gb", []) if value is not None]
    peak = summary.get("peak_memory_gb") or (max(memory) if memory else None)
    return {"tokens_per_second": rate, "step_seconds": each / rate if each and rate else None,
            "seconds": summary.get("seconds") or (seconds[-1] if seconds else None), "memory_gb": peak}  # fmt: skip


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _rows(logs: Path, at: Any) -> tuple[list[dict[str, Any]], Any, bool]:
    """Rows of the log, where they end, and whether those that were read before are no longer there."""
    path = logs / "metrics.jsonl"
    if path.is_file() or not (logs / "training_log.csv").is_file():
        rows, at, fresh = _lines(path, at)
        return [row for row in rows if isinstance(row.get("step"), int)], at, fresh
    rows = [row for name in ("training_log.csv", "eval_log.csv") for row in _csv(logs / name)]  # log.report_to without jsonl
    return rows, None, True


def _lines(path: Path, at: Any) -> tuple[list[dict[str, Any]], Any, bool]:
    """Whole lines of a .jsonl file after `at` ([which file, bytes read]) -> (objects, the new `at`, whether what was read before is
    no longer there). A line that cannot be read (a crash cut it short) is left out."""
    if not path.is_file():
        return [], None, at is not None
    with path.open("rb") as stream:
        # A resumed run replaces the file by one without the later rows: another inode, or a shorter file.
        which = _which(path)
        start = at[1] if isinstance(at, (list, tuple)) and at[0] == which and at[1] <= path.stat().st_size else 0
        stream.seek(start)
        raw = stream.read()
    whole = raw[: raw.rfind(b"\n") + 1]
    found = []
    for line in whole.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found, [which, start + len(whole)], at is not None and start != at[1]


def _which(path: Path) -> str:
    status = path.stat()
    return f"{status.st_dev}:{status.st_ino}"


def _csv(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [{key: _read(value) for key, value in row.items() if key and value} for row in csv.DictReader(stream)]
    marked = [{**row, "split": row.get("split", "validation")} for row in rows] if path.name == "eval_log.csv" else rows
    return [{**row, "step": int(row["step"])} for row in marked if isinstance(row.get("step"), float)]


def _read(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _samples(folder: Path, after: int) -> tuple[list[dict[str, Any]], int]:
    """The samples of steps later than `after`; of many, some spread over the run and the last."""
    found = sorted((int(path.stem.partition("-")[2]), path) for path in folder.glob("step-*.txt") if path.stem[5:].isdigit())
    new = spread([(step, path) for step, path in found if step > after], MOST_SAMPLES)
    texts = [{"step": step, "text": path.read_text(encoding="utf-8", errors="replace")[:LONGEST_SAMPLE]} for step, path in new]
    return texts, found[-1][0] if found else after


def tables_of(folder: Path) -> dict[str, Any]:
    """The tables of a run's config.toml, {} where it has none. InputError where it cannot be read."""
    path = folder / "config.toml"
    if not path.is_file():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise InputError(f"{path} is not readable: {problem}") from None


def json_table(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None where there is none, or one that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
