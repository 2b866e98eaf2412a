"""Tables of a report: which way is better comes from the objective, never from a metric's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from treadle.reporting.tables import sweep_board


def cells(**more: Any) -> list[dict[str, Any]]:
    return [{"point": {"lr": rate}, "seed": 0, "folder": f"runs/grid/{rate}", "metric": "exact", "value": value, "cpu_seconds": 1.0, **more}
            for rate, value in (("1", 0.25), ("2", 0.75), ("3", 0.5))]  # fmt: skip


@pytest.mark.parametrize(("lower", "order"), [(False, ["lr=2", "lr=3", "lr=1"]), (True, ["lr=1", "lr=3", "lr=2"]), (None, ["lr=1", "lr=2", "lr=3"])])
def test_a_sweep_is_ranked_by_what_its_runs_say(lower: bool | None, order: list[str], tmp_path: Path) -> None:
    """In sweep.json; in a run's summary, of a sweep.json without it, moved or not; unranked, and nothing marked, where nothing says it."""
    first = {"point": {"lr": "0"}, "seed": 0, "folder": "runs/grid/0", "metric": "", "value": None, "cpu_seconds": 0.0, "failed": "boom"}
    waits = {**first, "lower_is_better": None}
    said = sweep_board({"cells": [*cells(lower_is_better=lower), waits]}, tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.toml").touch()
    (tmp_path / "1" / "summary.json").write_text(json.dumps({"lower_is_better": lower} if lower is not None else {}), encoding="utf-8")
    for board in (said, sweep_board({"cells": [*cells(), first]}, tmp_path)):
        assert [row["label"] for row in board["rows"]] == [*order, "lr=0"] == [row["label"] for row in board["bars"]["rows"]]
        assert board["columns"][0]["lower_is_better"] is lower and board["bars"]["ranked"] is (lower is not None)
