"""`python -m bench --quick` as it is typed: every part answers with figures, or says why it has none."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.run import PARTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def bench(*arguments: str) -> str:
    """What it prints; it ends well, and leaves the results that the documents quote as they are."""
    before = {path.name: path.read_bytes() for path in RESULTS.iterdir()}
    done = subprocess.run([sys.executable, "-m", "bench", "--quick", *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=1500)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert {path.name: path.read_bytes() for path in RESULTS.iterdir()} == before
    return done.stdout


def answered(value: Any) -> bool:
    return bool(re.fullmatch(r"skipped \(.+\)", value)) if isinstance(value, str) else math.isfinite(value)


@pytest.mark.slow  # two minutes on two idle cores
def test_every_part_answers(tmp_path: Path) -> None:
    shown = bench("--output", str(tmp_path / "quick.json"))
    table = json.loads((tmp_path / "quick.json").read_text("utf-8"))
    assert table["quick"] is True and {"kind", "cores", "torch"} <= set(table["machine"]) and table["goals"]
    assert list(table["parts"]) == list(PARTS) and all(table["parts"].values())
    assert {f"{part}: {name}": value for part, values in table["parts"].items() for name, value in values.items() if not answered(value)} == {}
    assert all(f"\n{part}: " in shown for part in PARTS) and "figures of --quick are no measurement" in shown


@pytest.mark.slow  # with torch's import, some seconds
def test_without_a_place_it_writes_nothing() -> None:
    assert "skipped (" in (shown := bench("--only", "demo")) and "written to" not in shown
