"""A run's folder as it grows, is torn, is rewritten and goes away: whoever asked before knows at last what is on the disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.live.conftest import Known, RunFolder, suite
from treadle.errors import InputError
from treadle.live import watched as watching
from treadle.live.followed import Followed
from treadle.live.watched import Watched, found, kind_of
from treadle.reporting.report import found_in
from treadle.reporting.run_data import run_in


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "FRESH", 0.0)


def known(folder: Path, watched: Watched | None = None) -> Known:
    made = Known()
    made.take((watched or Watched(folder)).news())
    return made


def test_only_what_is_new_is_told(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.steps(1, 50)
    watched = Watched(run.folder)
    page = known(run.folder, watched)
    assert page.runs[0]["steps"] == list(range(1, 51))
    run.steps(51, 53, extra=1.0)
    run.write({"step": 53, "split": "validation", "loss": 1.0})
    news = watched.news(page.cursor)
    (told,) = news["runs"]
    assert told["from"]["rows"] == 50 and told["steps"] == [51, 52, 53] and len(told["evals"]) == 1
    page.take(news)
    assert page.runs[0]["columns"]["extra"] == [None] * 50 + [1.0] * 3  # a column that comes later is as long as the others
    assert page.runs[0]["columns"]["loss"] == [5.0 / step for step in range(1, 54)]
    again = watched.news(page.cursor)
    assert again["runs"] == [] and len(json.dumps(again)) < 300  # nothing new: nothing to send


def test_several_tabs_know_the_same(tmp_path: Path) -> None:
    """Each tab asks at its own times, through a resume that takes rows back, a torn line, a folder that is away for a while."""
    run, chance = RunFolder(tmp_path / "run"), random.Random(0)
    watched, tabs, step, away = Watched(run.folder), [Known() for _ in range(4)], 0, tmp_path / "away"
    for _ in range(400):
        action = chance.random()
        if action < 0.3:
            run.steps(step + 1, step + (more := chance.randrange(1, 4)))
            step += more
        elif action < 0.36 and step:
            step = chance.randrange(step)
            run.resumed_at(step)
        elif action < 0.45:
            run.write({"event": "saved", "step": step}, name="events.jsonl")
        elif action < 0.5:
            run.write({"step": step, "split": "validation", "loss": 1.0})
        elif action < 0.55:
            line = json.dumps({"step": step + 1, "loss": 5.0 / (step + 1), "seconds": 0.5 * (step + 1)}) + "\n"
            with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(line[:9])
                stream.flush()
                tabs[0].take(watched.news(tabs[0].cursor))  # reads half a line
                stream.write(line[9:])
            step += 1
        elif action < 0.6:
            run.folder.rename(away)
            tabs[1].take(watched.news(tabs[1].cursor))
            assert tabs[1].runs[0]["status"]["state"] == "gone"
            away.rename(run.folder)
        else:
            tab = chance.choice(tabs)
            tab.take(watched.news(tab.cursor))
    truth = known(run.folder).runs[0]
    for tab in tabs:
        tab.take(watched.news(tab.cursor))
        assert tab.runs[0] == truth
    assert truth["steps"] == list(range(1, step + 1))


def test_a_run_that_starts_anew_in_the_same_folder_replaces_the_old_curves(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.steps(1, 30)
    watched = Watched(run.folder)
    page = known(run.folder, watched)
    shutil.rmtree(run.folder)
    page.take(watched.news(page.cursor))
    assert page.runs[0]["status"]["state"] == "gone"
    RunFolder(tmp_path / "run").steps(1, 3, other=2.0)
    page.take(watched.news(page.cursor))
    assert page.runs[0]["steps"] == [1, 2, 3] and page.runs[0]["columns"]["other"] == [2.0] * 3


@pytest.mark.parametrize("odd", ["[model", "\x00", 'log = 3\n[model]\narch = "x"', ""])
def test_torn_settings_are_waited_for(tmp_path: Path, odd: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.steps(1, 3)
    whole = (run.folder / "config.toml").read_text("utf-8")
    (run.folder / "config.toml").write_text(odd, encoding="utf-8")
    watched = Watched(run.folder)
    page = known(run.folder, watched)
    (run.folder / "config.toml").write_text(whole, encoding="utf-8")
    page.take(watched.news(page.cursor))
    assert page.runs[0]["steps"] == [1, 2, 3]


def test_what_a_run_is_doing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", trained=False)
    follow = Followed(run.folder, 0, 100)

    def state() -> str:
        follow.refresh(follow.changed + 1)
        return str(follow.status["state"])

    assert state() == "waiting"
    run.lock()
    assert state() == "preparing"
    run.write({"event": "started", "step": 0, "plan": {"max_steps": 40}}, name="events.jsonl")
    run.steps(1, 10)
    assert state() == "training"
    assert follow.status["seconds_left"] == pytest.approx(0.5 * 30) and follow.status["max_steps"] == 40
    run.write({"event": "saved", "step": 12}, name="events.jsonl")
    run.end("stopped", 12)
    assert state() == "stopped" and follow.status["reason"] == "stop" and follow.status["step"] == 12 and follow.status["saved"] == 12
    os.utime(run.folder / "summary.json", ns=(0, 0))
    run.lock()  # resumed: the summary of the time before says nothing now
    assert state() == "preparing"
    run.steps(13, 14)
    assert state() == "training" and follow.status["step"] == 14
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.lock(gone.pid)  # killed: no summary, no process
    os.utime(run.folder / "LOCK", ns=(1, 1))
    assert state() == "interrupted"
    run.end("finished", 14)
    os.utime(run.folder / "summary.json", ns=(0, 0))  # a command that was refused has taken the lock since
    assert state() == "finished" and follow.status["step"] == 14
    run.write({"event": "resumed", "step": 14}, name="events.jsonl")  # and one that was killed while it trained
    assert state() == "interrupted"


def test_a_long_run_stays_small_and_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.steps(1, 20_000)
    watched = Watched(run.folder)
    page = known(run.folder, watched)
    steps = page.runs[0]["steps"]
    assert 3000 <= len(steps) <= 6000 and steps[0] == 1 and steps[-1] > 19_990
    assert page.runs[0]["columns"]["loss"] == [5.0 / step for step in steps]
    assert page.runs[0]["status"]["step"] == 20_000  # the newest row, whether it is kept or not
    run.steps(20_001, 30_000)
    page.take(watched.news(page.cursor))
    assert page.runs[0] == known(run.folder).runs[0] and page.runs[0]["steps"][-1] > 29_990


def test_many_events_leave_the_newest(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.steps(1, 5)
    watched, page = Watched(run.folder), Known()
    for number in range(1200):
        run.write({"event": "saved", "step": number}, name="events.jsonl")
        if number % 100 == 50:
            page.take(watched.news(page.cursor))
            page_steps = [event["step"] for event in page.runs[0]["events"]]
            assert page_steps == list(range(page_steps[0], number + 1)) and 200 < len(page_steps) + 200 <= 700


def test_a_nonsense_cursor_gives_everything(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.steps(1, 5)
    watched = Watched(run.folder)
    session = watched.news()["cursor"].partition("-")[0]
    for cursor in ("", "-", "x-5", f"{session}-", f"{session}--1", f"{session}-٣", f"{session}-9" + "9" * 30, "\ud800", "0" * 100):
        assert watched.news(cursor)["runs"][0]["steps"] == [1, 2, 3, 4, 5]


def cells(**values: float | None) -> dict[str, Any]:
    return {"cells": [{"point": {"optim.learning_rate": rate}, "seed": seed, "folder": f"runs/sw/{rate}-{seed}", "metric": "bpb", "step": 9, "lower_is_better": True,
                       "value": values.get(f"v{rate}_{seed}"), "cpu_seconds": 2.0, "failed": ""} for seed in (0, 1) for rate in ("1", "2")]}  # fmt: skip


def test_a_sweep_in_a_folder_that_was_moved(tmp_path: Path) -> None:
    for rate in ("1", "2"):
        RunFolder(tmp_path / "moved" / f"{rate}-0").steps(1, 3)
    watched = Watched(tmp_path / "moved")
    page = known(tmp_path, watched)
    assert len(page.runs) == 2 and {run["label"] for run in page.runs.values()} == {"1-0", "2-0"}
    (tmp_path / "moved" / "sweep.json").write_text(json.dumps(cells(v1_0=3.0, v2_0=2.0)), encoding="utf-8")
    page.take(watched.news(page.cursor))
    assert {run["label"] for run in page.runs.values()} == {"optim.learning_rate=1 · seed 0", "optim.learning_rate=2 · seed 0"} | (
        {f"optim.learning_rate={rate} · seed 1" for rate in "12"})  # fmt: skip
    group = page.group
    assert [job["state"] for job in group["jobs"]] == ["done", "done", "waiting", "waiting"]
    assert [(row["label"], row["cells"]["value"]["mean"]) for row in group["board"]["rows"]] == [("optim.learning_rate=2", 2.0), ("optim.learning_rate=1", 3.0)]
    (tmp_path / "moved" / "sweep.json").write_text('{"cells": [{"poi', encoding="utf-8")  # torn
    page.take(watched.news(page.cursor))
    assert page.group == group
    (tmp_path / "moved" / "sweep.json").write_text(json.dumps(cells(v1_0=3.0, v2_0=2.0, v1_1=5.0)), encoding="utf-8")
    page.take(watched.news(page.cursor))
    assert page.group["board"]["rows"][1]["cells"]["value"] == {"mean": 4.0, "low": 3.0, "high": 5.0}


@pytest.mark.parametrize("before", ["/gone/runs/sw", "runs/sw"])
def test_a_moved_run_is_the_same_to_a_page_and_a_report(tmp_path: Path, before: str) -> None:
    """Also of a name that began at the root of another machine; the longest end of it that is there is meant."""
    root = tmp_path / "moved"
    for place in ("search/1-0", "1-0"):
        RunFolder(root / place).steps(1, 3)
    (root / "begun").mkdir()
    assert run_in(root, f"{before}/search/1-0") == root / "search" / "1-0" and run_in(root, f"{before}/1-0") == root / "1-0"
    assert run_in(root, f"{before}/begun") == root / "begun" and run_in(root, f"{before}/waits") is None
    cell = {**cells()["cells"][0], "folder": f"{before}/search/1-0"}
    (root / "sweep.json").write_text(json.dumps({"cells": [cell, {**cell, "folder": f"{before}/begun"}, {**cell, "folder": f"{before}/waits"}]}), encoding="utf-8")
    assert [job["folder"] for job in known(root).group["jobs"]] == [str(root / "search" / "1-0"), str(root / "begun"), f"{before}/waits"]
    assert [place.folder for place in found_in([str(root)])[0]] == [root / "search" / "1-0"]


@pytest.mark.parametrize("table", [{}, {"cells": 3}, {"cells": [None]}, {"cells": [{"point": 1}]}, {"jobs": [1]}, {"jobs": [], "metric": 1, "columns": None}])
@pytest.mark.parametrize("name", ["suite", "sweep"])
def test_tables_that_make_no_sense_leave_the_runs(tmp_path: Path, name: str, table: Any) -> None:
    RunFolder(tmp_path / "several" / "one").steps(1, 3)
    (tmp_path / "several" / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
    page = known(tmp_path / "several")
    assert page.runs[0]["steps"] == [1, 2, 3]


def test_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="nothing in runs/ yet"):
        found("last")
    RunFolder(Path("runs/old")).steps(1, 2)
    os.utime("runs/old/metrics.jsonl", (1, 1)), os.utime("runs/old/LOCK", (1, 1))
    RunFolder(Path("runs/new")).steps(1, 2)
    assert found("last") == Path("runs/new") and kind_of(Path("runs")) == "folder" and kind_of(Path("runs/new")) == "run"
    with pytest.raises(InputError, match=r"runs/nwe does not exist; there is: runs/new, runs/old"):
        found("runs/nwe")
    with pytest.raises(InputError, match="is a file"):
        found("runs/new/metrics.jsonl")


def test_a_suite_from_before_its_first_job_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("runs/su")
    root.mkdir(parents=True)
    (root / "LOCK").write_text("process 1 on elsewhere", encoding="utf-8")
    watched = Watched(root)
    page = known(root, watched)
    assert page.group is None or not page.group["jobs"]
    (root / "suite.json").write_text(json.dumps(suite("running", "waiting", "waiting")), encoding="utf-8")
    RunFolder(root / "runs" / "0").steps(1, 5)
    page.take(news := watched.news(page.cursor))
    assert news["kind"] == "suite" and news["whole"] and [run["label"] for run in page.runs.values()] == ["shc, seed 0"]
    assert page.group["done"] is False and page.group["cpu_seconds"] == 8.0 and page.group["board"]["rows"][0]["cells"]["bpb"]["mean"] == 2.0
    (root / "suite.json").write_text(json.dumps(suite("done", "done", "failed")), encoding="utf-8")
    RunFolder(root / "runs" / "1").steps(1, 7)
    page.take(watched.news(page.cursor))
    assert [(job["kind"], job["state"], job["problem"]) for job in page.group["jobs"]] == [
        ("search", "done", ""), ("run", "done", ""), ("run", "failed", "out of memory")]  # fmt: skip
    assert [job["colour"] for job in page.group["jobs"]] == [0, 0, 7]  # an entry's own; dashed from its second seed on
    assert page.group["done"] is True and {run["folder"] for run in page.runs.values()} == {job["folder"] for job in page.group["jobs"]}
