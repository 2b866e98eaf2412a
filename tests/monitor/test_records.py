"""The small JSON files of a run are JSON, whatever a number became."""

import json
from pathlib import Path
from typing import Any

import pytest

from treadle.live.desk import as_json
from treadle.monitor.records import write_event, write_json
from treadle.reporting import pages

TABLE: dict[str, Any] = {"plan": {"loss": float("nan"), "sizes": (1, float("inf")), "name": "a"}, "rows": [{"loss": -float("inf")}]}
CLEAN = {"plan": {"loss": None, "sizes": [1, None], "name": "a"}, "rows": [{"loss": None}]}


def read(text: str | bytes) -> Any:
    """JSON as others read it, who know no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_not_finite_is_null_however_deep_it_lies(tmp_path: Path) -> None:
    write_event(tmp_path, "started", **TABLE)
    write_json(tmp_path / "table.json", TABLE)
    event = read((tmp_path / "events.jsonl").read_text("utf-8"))
    assert {name: event[name] for name in TABLE} == CLEAN
    assert read((tmp_path / "table.json").read_text("utf-8")) == read(as_json(TABLE)) == read(pages.as_json(TABLE)) == CLEAN


def test_a_page_takes_what_json_has_no_word_for_as_text() -> None:
    assert read(pages.as_json({"place": Path("a/b"), 3: {"of": (Path("c"),)}})) == {"place": "a/b", "3": {"of": ["c"]}}
