"""The document's tables come from a result, its words stay; a part fails alone."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import contest, pictures, report, run

RESULT = {
    "machine": {"processor": "Some(R) CPU", "kind": "plain", "features": ["avx2"], "cores": 2, "threads": 1, "load": [0.1], "python": "3.11", "torch": "2.13"},
    "parts": {
        "contest": {
            "ours auto: tokens per CPU-second": 2000.0, "ours auto: share of peak": 0.5, "ours auto: peak GB": 1.0,
            "ours auto: CPU seconds to the first step": 3.0, "litgpt fp32: tokens per CPU-second": "skipped (not installed)",
        },
        "memory": {"interpreter with torch: GB": 0.2, "10.8M parameters, ours auto: GB": 0.9},
    },
}  # fmt: skip


def test_marked_places_are_written_and_words_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = "Words.\n\n" + "\n".join(f"<!-- {name} -->\nold\n<!-- end -->\nbetween" for name in report.SECTIONS)
    made = report.render(text, [RESULT])
    assert made.startswith("Words.") and "old" not in made and made.count("between") == len(report.SECTIONS)
    assert "Some CPU (no fast bf16): 0 met, 1 missed," in made and "| peak memory of the 10.8M run, GB | at most 0.8 | 0.9 **MISSED by 12%** |" in made
    assert "| litgpt fp32 | skipped (not installed) |" in made and "| ours auto | 2,000 | 50% | 1.00 | 3.0 |" in made
    assert "Not measured in this run: `python -m bench --only demo`" in made
    assert report.render(made, [RESULT]) == made
    assert (tmp_path / "performance_training.svg").exists() and not (tmp_path / "performance_scale.svg").exists()


def test_each_kind_of_machine_has_its_goals_and_other_parts_are_the_newest_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    old = {**RESULT, "machine": {**RESULT["machine"], "processor": "Old", "kind": "amx"},
           "parts": {"contest": {"auto over HF bf16": 2.5}, "memory": {"10.8M parameters, ours auto: GB": 0.7}, "demo": {"bits": 1.25}}}  # fmt: skip
    for name, result in {"cpu-20260101": {**old, "parts": {}}, "cpu-20260102": old, "cpu-20260103": RESULT, "cpu-20260104": {"first": "form"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    assert [path.stem for path in report.newest()] == ["cpu-20260103", "cpu-20260102"]
    goals, memory, demo = (report.SECTIONS[name]([RESULT, old]) for name in ("goals", "memory", "demo"))
    assert "| goal | wanted | Some CPU (no fast bf16) | Old (AMX) | GPU |" in goals
    assert "| peak memory of the 10.8M run, GB | at most 0.8 | 0.9 **MISSED by 12%** | 0.7 met |" in goals
    assert "| our defaults against Hugging Face Trainer bf16, tokens per CPU-second (AMX) | at least 2.4 |  | 2.5 met |" in goals
    assert memory.index("Some CPU") < memory.index("0.9") < memory.index("Old") < memory.index("0.7")
    assert demo == "Old (AMX):\n\n| learning |  |\n| --- | --- |\n| bits | 1.25 |"


def test_bars_are_drawn_to_scale(tmp_path: Path) -> None:
    pictures.bars(tmp_path / "x.svg", "a < b", [("ours", 2.0), ("other", 1.0)], mark=4.0)
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    widths = [float(one.attrib["width"]) for one in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths == [pictures.WIDTH / 2, pictures.WIDTH / 4]


def test_a_part_that_fails_or_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("bench_broken")
    broken.__spec__ = types.SimpleNamespace(name="bench_broken")  # type: ignore[assignment]
    broken.measure = lambda quick: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bench_broken", broken)
    monkeypatch.setattr(run, "PARTS", {"broken": ("bench_broken", ""), "absent": ("bench.no_such_part", "")})
    assert run.measure_part("broken", True)["broken"].startswith("FAILED (ZeroDivisionError")
    assert run.measure_part("absent", True)["absent"] == "skipped (bench.no_such_part is not there)"


def test_a_missing_contestant_is_no_ratio() -> None:
    runs = {"ours auto": [{"cpu": 1.0}, {"cpu": 2.0}], "plain fp32": [{"cpu": 3.0}, {"cpu": 2.0}]}
    assert contest.compared(runs, {}, "ours auto", "plain fp32", "cpu") == 2.0  # 3.0 and 1.0
    said = contest.compared(runs, {"litgpt fp32": "skipped (not installed)"}, "ours auto", "litgpt fp32", "cpu")
    assert said == "skipped (not installed)"
