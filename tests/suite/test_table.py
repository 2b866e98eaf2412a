"""The table of a suite in a terminal: what fits is shown, and where the rest is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from treadle.suite import command
from treadle.suite.table import lines_of, notes

SPREAD = {"mean": 2.25, "low": 2.125, "high": 2.5, "values": [2.125, 2.5]}
COLUMNS = [{"key": "bpb", "title": "bits/byte", "unit": "mean"}, {"key": "tokens_per_second", "title": "tokens/s", "unit": "1/s"},
           {"key": "peak_memory_gb", "title": "peak memory", "unit": "GB"}]  # fmt: skip
PAIRED = {"against": "dense", "difference": 0.25, "low": 0.125, "high": 0.5}


def result() -> dict[str, Any]:
    cells = {"bpb": SPREAD, "tokens_per_second": {"mean": 12_345.0}, "peak_memory_gb": {"mean": 1.5}}
    rows = [{"label": label, "parameters": 20_000, "learning_rate": 1e-2, "learning_rate_at_edge": False, "cells": cells, "paired": paired}
            for label, paired in (("dense", None), ("recurrent", PAIRED))]  # fmt: skip
    cost = dict.fromkeys(("cpu_seconds", "of_search", "of_runs", "of_probes", "of_measuring"), 1.0)
    return {"columns": COLUMNS, "rows": rows, "cost": cost, "budget": {"bytes": 8192, "seeds": 2}, "metric": "bpb", "scaling": [], "jobs": [],
            "data": {"same_rows_in_the_same_order": None}}  # fmt: skip


def test_columns_that_do_not_fit_are_left_out_and_that_is_said() -> None:
    found = result()
    whole = lines_of(found)
    wide = max(map(len, whole[:4]))
    assert lines_of(found, wide, "x/suite.md") == whole and "peak memory" in whole[0]
    counts = set()
    for width in range(wide - 1, 0, -1):
        table = lines_of(found, width, "x/suite.md")
        table = table[: table.index("")]
        head, said = table[0].split(), table[-1]
        assert "x/suite.md" in said and len(table) == (5 if "tokens/s" in head or "peak" in head else 4)
        shown = 7 - int(said.split()[0])
        assert "bits/byte" in head and table[-2].startswith("recurrent")
        assert shown == 2 or max(map(len, table[:-1])) <= width
        counts.add(shown)
    assert counts == {2, 3, 4, 5, 6}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_pipe_gets_the_whole_table(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(command, "columns", lambda stream: 50 if terminal else None)
    monkeypatch.setattr(command, "read_suite", lambda name: None)
    monkeypatch.setattr(command.running, "run", lambda *arguments: result())
    monkeypatch.setattr(command, "write", said.append)
    command.compare_suite("some", None, str(tmp_path), None, False)
    assert any("peak memory" in line for line in said) != terminal
    assert any(f"columns more are in {tmp_path / 'suite.md'}" in line for line in said) == terminal
    assert all(note in said for note in notes(result()))
