"""What a run's folder says: read whole, and again while it grows; nothing of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reporting.conftest import write_run
from treadle.errors import InputError
from treadle.monitor.records import environment
from treadle.reporting.run_data import read_run
from treadle.reporting.thinning import thinned


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert run["name"] == "one" and run["steps"] == list(range(1, 41)) and run["config"]["model.hidden_size"] == 32
    assert all(len(values) == 40 for values in run["columns"].values()) and run["columns"]["tokens"][-1] == 256 * 40
    assert [row["step"] for row in run["evals"]] == [10, 20, 30, 40] and run["bytes_per_token"] == 2.0
    assert [sample["step"] for sample in run["samples"]] == [10, 20, 30, 40]
    assert [event["event"] for event in run["events"]] == ["started", "saved", "rolled_back", "command", "finished"]
    assert run["plan"]["max_steps"] == 40 and run["summary"]["status"] == "finished" and not run["restarted"]


def test_only_what_is_new_and_no_half_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    offsets = json.loads(json.dumps(read_run(folder)["offsets"]))  # they travel through a browser
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 41, "loss": 1.0}\n{"step": 42, "lo')
    second = read_run(folder, offsets)
    assert second["steps"] == [41] and second["evals"] == [] and second["samples"] == [] and second["events"] == []
    assert second["bytes_per_token"] == 2.0 and second["plan"]["max_steps"] == 40
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('ss": 0.5}\n')
    third = read_run(folder, second["offsets"])
    assert third["steps"] == [42] and third["columns"] == {"loss": [0.5]} and not third["restarted"]


def test_a_log_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    """A resumed run replaces metrics.jsonl by one without the rows after its checkpoint."""
    folder = write_run(tmp_path / "run")
    offsets = read_run(folder)["offsets"]
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:5]
    (folder / "new").write_text("".join(lines))
    (folder / "new").replace(folder / "metrics.jsonl")
    again = read_run(folder, offsets)
    assert again["restarted"] and again["steps"] == [1, 2, 3, 4, 5]


def test_runs_with_csv_alone_or_nothing_yet(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    (folder / "training_log.csv").write_text("step,loss\n1,2.5\n2,\n")
    (folder / "eval_log.csv").write_text("step,split,loss\n2,test,2.0\n")
    run = read_run(folder)
    assert run["steps"] == [1, 2] and run["columns"]["loss"] == [2.5, None] and run["evals"] == [{"step": 2, "split": "test", "loss": 2.0}]
    (folder / "training_log.csv").unlink()
    assert read_run(folder)["steps"] == []
    with pytest.raises(InputError, match="treadle train makes one"):
        read_run(tmp_path)


def test_reading_runs_needs_no_torch() -> None:
    code = "import sys, treadle.reporting.run_data, treadle.reporting.pages, treadle.reporting.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("typed", "known"), [("/lib/treadle/__main__.py", "treadle"), ("/bin/treadle", "treadle"), ("mine/train.py", "train.py")])
def test_the_command_is_what_one_types(monkeypatch: pytest.MonkeyPatch, typed: str, known: str) -> None:
    monkeypatch.setattr(sys, "argv", [typed, "train", "story.txt"])
    assert environment()["command"] == [known, "train", "story.txt"]


def test_thinned_curves_keep_every_extreme() -> None:
    steps = list(range(10_000))
    values: list[float | None] = [float(step % 7) for step in steps]
    values[5123], values[77] = 99.0, -5.0
    kept, columns = thinned(steps, {"loss": values, "tokens": [10 * step for step in steps], "rare": [None] * 9999 + [1.0]}, 400)
    assert len(columns["loss"]["values"]) <= 402 and max(columns["loss"]["values"]) == 99.0 and min(columns["loss"]["values"]) == -5.0
    assert kept[columns["loss"]["at"][columns["loss"]["values"].index(99.0)]] == 5123
    assert kept[0] == 0 and kept[-1] == 9999 and [kept[at] for at in columns["rare"]["at"]] == [9999]
    assert columns["tokens"]["values"] == [10 * step for step in kept]  # what others are drawn against is whole
