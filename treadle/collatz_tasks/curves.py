"""What a run has learned, evaluation after evaluation, as series to plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from treadle.collatz.plots import Series
from treadle.errors import ConfigError

# Metric of an evaluation -> what stands above its curve, in the order of the panels.
SHOWN = {
    "exact": "share of long steps written exactly",
    "classes_mastered": "classes (k, k') mastered",
    "loss_next_step": "cross-entropy of the next step, nats",
    "stopping_r2": "R2 of the stopping time",
    "effective_bits": "effective bits of the stopping time",
}


def run_series(folder: str | Path) -> list[Series]:
    """A series for each metric of SHOWN that the run's evaluations have. ConfigError for a folder without any."""
    path = Path(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    rows = [row for row in rows if row.get("split") == "validation"]
    found = []
    for name, title in SHOWN.items():
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        if values:
            found.append(Series(f"{Path(folder).name}: {title}{_beside(name, rows[-1])}", f"evaluation, the last after step {rows[-1]['step']:,}", name, values))
    if not found:
        raise ConfigError(f"{folder} holds no evaluation of a Collatz task; give a run of treadle train collatz, a number, or a certificate")
    return found


def _beside(name: str, row: dict[str, Any]) -> str:
    return f" (floor {row['floor']:.4f})" if name == "loss_next_step" and "floor" in row else ""
