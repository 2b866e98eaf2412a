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
