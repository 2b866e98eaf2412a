"""The small JSON files of a run: what happened when, on what, and how it ended."""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from treadle.files import write_atomically
from treadle.monitor.sinks import finite
from treadle.version import __version__

PACKAGES = ("torch", "numpy", "tokenizers", "pydantic")


def write_event(run: Path, kind: str, **details: Any) -> None:
    """Appends one object to events.jsonl."""
    event = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": kind, **details}
    with (run / "events.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(finite(event), allow_nan=False) + "\n")


def last_evaluation(log: Path) -> dict[str, float]:
    """The newest row of an eval_log.csv that is of validation data, as numbers by name; {} where there is none."""
    if not log.is_file():
        return {}
    with log.open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("split", "validation") == "validation"]
    return {name: float(value) for name, value in rows[-1].items() if name != "split" and value} if rows else {}


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Replaces a JSON file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(finite(table), indent=1, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"treadle": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, Any]:
    """The machine and the software of this start; holds no names of people and no environment variables."""
    import torch

    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": [_program(Path(sys.argv[0])), *sys.argv[1:]],
    }


def _program(path: Path) -> str:
    """What somebody types to start the same again: `python -m treadle` is treadle."""
    return "treadle" if path.name == "__main__.py" and path.parent.name == "treadle" else path.name
