"""The guide's training as a user lives it: stopped by a word, continued, killed, alerts at a local web server, all exact."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.monitor.test_alerts import Server
from tests.training.test_resume import same_end, start

STEPS = 30


@pytest.fixture()
def webhook() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()


def line(folder: Path, *more: str) -> list[str]:
    shape = ["--D_MODEL", "32", "--NUM_LAYERS", "1", "--NHEAD", "2", "--BATCH_SIZE", "64", "--NUM_WORKERS", "1", "--STEPS", str(STEPS), "--SAVE_EVERY", "5"]
    rest = ["--eval_steps", "10", "--eval_rows", "64", "--logging_steps", "1", "--alert_steps", "10", "--alerts.minimum_seconds", "0", "--precision", "fp32"]
    return [sys.executable, "-m", "treadle", "train", "collatz", *shape, *rest, "--output_dir", str(folder), *more]


def wait_for(folder: Path, rows: int) -> None:
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 90
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.01)
    raise AssertionError("training did not get so far")


def said(webhook: Server) -> list[tuple[str, str]]:
    return [(message["event"], message["text"]) for _, message in webhook.received]


def test_stopped_continued_killed_and_told(webhook: Server, tmp_path: Path) -> None:
    whole = start(line(tmp_path / "whole"))
    out, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, out

    told: dict[str, Any] = {"TREADLE_WEBHOOK_URL": webhook.url}
    first = start(line(tmp_path / "parts"), **told)
    wait_for(tmp_path / "parts", 7)
    stop = start([sys.executable, "-m", "treadle", "ctl", str(tmp_path / "parts"), "stop"])
    answer, _ = stop.communicate(timeout=60)
    out, _ = first.communicate(timeout=100)
    assert stop.returncode == 0 and "stopping after step" in answer, answer
    assert first.returncode == 75, out
    events = [event for event, _ in said(webhook)]
    assert events[0] == "start" and events[-1] == "stopped"

    second = start(line(tmp_path / "parts"), **told)  # killed in the middle
    wait_for(tmp_path / "parts", 18)
    os.kill(second.pid, signal.SIGKILL)
    second.communicate()

    third = start(line(tmp_path / "parts"), TREADLE_WEBHOOK_URL="http://127.0.0.1:9/", DISCORD_WEBHOOK_URL=webhook.url)
    out, _ = third.communicate(timeout=200)
    assert third.returncode == 0, out  # a webhook that is down stops nothing
    assert "could not be sent (TREADLE_WEBHOOK_URL" in out
    discord = [message["content"] for _, message in webhook.received if "content" in message]
    assert any(f"step {STEPS} of {STEPS}" in text for text in discord) and any("resumed at step" in text for text in discord)
    same_end(tmp_path / "whole", tmp_path / "parts", STEPS)
    rows = [json.loads(row) for row in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert sum("floor" in row for row in rows) == 3  # evaluations


def test_the_search_beside_the_training(webhook: Server, tmp_path: Path) -> None:
    """Each cycle that is not in the list of its map is told once, with its number; the search ends and goes on with the run."""
    more = ["--collatz.search", "1", "--collatz.search_map", "3x+101"]
    endless = [word if word != str(STEPS) else "100000" for word in line(tmp_path / "run")]
    first = start([*endless, *more], TREADLE_WEBHOOK_URL=webhook.url)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and len(discoveries(webhook)) < 7:
        time.sleep(0.1)
    assert searching(tmp_path) == 1
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=100)
    assert first.returncode == 143 and searching(tmp_path) == 0, out
    assert sorted(discoveries(webhook), key=int) == ["7", "11", "19", "23", "29", "31", "37"], out
    reached = len((tmp_path / "run" / "search.jsonl").read_bytes())
    assert reached > 0 and "searching 3x+101 from 1" in out

    second = start([*endless, "--collatz.search", "1", "--collatz.search_map", "3x+101"], TREADLE_WEBHOOK_URL=webhook.url)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and (tmp_path / "run" / "search.jsonl").stat().st_size <= reached:
        time.sleep(0.1)
    second.kill()  # as kill -9: the search ends with its training
    second.communicate()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and searching(tmp_path):
        time.sleep(0.1)
    assert searching(tmp_path) == 0 and len(discoveries(webhook)) == 7  # nothing is told twice
    assert (tmp_path / "run" / "search.jsonl").stat().st_size > reached


def discoveries(webhook: Server) -> list[str]:
    return [message["number"] for _, message in webhook.received if message.get("event") == "discovery"]


def searching(folder: Path) -> int:
    """Processes that search into this folder's log."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found += b"search" in words and str(folder / "run" / "search.jsonl").encode() in words
    return found
