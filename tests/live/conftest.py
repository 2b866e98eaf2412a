"""What tests of the live page share: folders that look like runs, a desk behind a socket, and what a page would know."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treadle.live.desk import Desk
from treadle.live.server import Server
from treadle.serving.sockets import listening


class RunFolder:
    """A run's files, written as a training writes them."""

    def __init__(self, folder: Path, trained: bool = True) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text('[model]\narch = "transformer"\n', encoding="utf-8")
        if trained:
            self.lock()

    def lock(self, process: int | None = None) -> None:
        (self.folder / "LOCK").write_text(f"process {process or os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def write(self, *rows: dict[str, Any], name: str = "metrics.jsonl") -> None:
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    def steps(self, first: int, last: int, **more: Any) -> None:
        self.write(*({"step": step, "loss": 5.0 / step, "seconds": 0.5 * step, **more} for step in range(first, last + 1)))

    def resumed_at(self, step: int) -> None:
        """The log is replaced by one without the later rows, as monitor/sinks.py does."""
        log = self.folder / "metrics.jsonl"
        kept = [line for line in log.read_text("utf-8").splitlines(True) if json.loads(line)["step"] <= step]
        log.with_suffix(".new").write_text("".join(kept), encoding="utf-8")
        log.with_suffix(".new").replace(log)

    def end(self, status: str, step: int) -> None:
        self.write({"event": status, "step": step, "reason": "stop"}, name="events.jsonl")
        table = {"status": status, "step": step, "ranking_metric": "loss", "lower_is_better": True, "cpu_seconds": 1.5}
        (self.folder / "summary.json").write_text(json.dumps(table), encoding="utf-8")


class Known:
    """What a page knows: answers put together as live.js does it."""

    def __init__(self) -> None:
        self.cursor, self.runs, self.group = "", dict[int, dict[str, Any]](), None

    def take(self, news: dict[str, Any]) -> None:
        news = json.loads(json.dumps(news))
        if news["whole"]:
            self.runs.clear()
        self.cursor, self.group = news["cursor"], news["group"] or self.group
        for told in news["runs"]:
            start, run = told["from"], self.runs.get(told["number"])
            if run is None or not start["rows"]:
                run = {"steps": [], "columns": {}, "evals": [], "events": []}
            run["steps"] = run["steps"][: start["rows"]] + told["steps"]
            for name in {*run["columns"], *told["columns"]}:
                kept = run["columns"].get(name, [])[: start["rows"]]
                run["columns"][name] = kept + [None] * (start["rows"] - len(kept)) + told["columns"].get(name, [None] * len(told["steps"]))
            for name in ("evals", "events"):
                run[name] = run[name][: start[name]] + told[name]
            run |= {name: told[name] for name in ("status", "label", "folder", "sample")}
            self.runs[told["number"]] = run


def suite(*states: str) -> dict[str, Any]:
    """suite.json of an entry: a job that chooses a rate, then runs, each in one of these states."""
    jobs = [{"label": f"shc, seed {seed}", "kind": "run" if seed else "search", "seed": seed, "learning_rate": 0.01, "state": state, "cpu_seconds": 2.0,
             "folder": f"runs/su/runs/{seed}" if state != "waiting" else None, "problem": "out of memory" if state == "failed" else ""}
            for seed, state in enumerate(states)]  # fmt: skip
    return {"name": "su", "budget": {"bytes": 9}, "metric": "bpb", "columns": [{"key": "bpb", "title": "bits per byte", "unit": "", "lower_is_better": True}],
            "rows": [{"label": "shc", "cells": {"bpb": {"mean": 2.0, "low": 1.0, "high": 3.0, "values": [1.0, 3.0]}}, "runs": [], "paired": None}],
            "scaling": [], "jobs": jobs, "cost": {"cpu_seconds": 8.0, "of_search": 2.0}, "done": all(state in ("done", "failed") for state in states)}  # fmt: skip


@contextlib.contextmanager
def behind_socket(desk: Desk, port: int = 0) -> Iterator[str]:
    listener = listening("127.0.0.1", port)
    with Server(listener, desk) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join(10)
