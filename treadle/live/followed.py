"""One run as it grows: what its folder says, read again and again, and what of it is new to somebody who knew a part."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from treadle.checkpoint.lock import LOCK_FILE
from treadle.errors import InputError
from treadle.monitor.control import holder
from treadle.reporting.run_data import read_run

MOST_EVENTS = 500
HISTORY = 4096  # answers that are remembered to tell what is new; whoever knew less gets everything
LOGS = ("metrics.jsonl", "training_log.csv", "eval_log.csv", "samples")
FILES = ("events.jsonl", "summary.json", "config.toml", LOCK_FILE)
GONE, WAITING, PREPARING, TRAINING, INTERRUPTED = "gone", "waiting", "preparing", "training", "interrupted"
ACTIVE = (PREPARING, TRAINING)


class Followed:
    """most_rows: rows that are kept; of a longer run every second one is left out, again and again. columns: those that are
    kept, None: all."""

    def __init__(self, folder: Path, number: int, most_rows: int, columns: Iterable[str] | None = None) -> None:
        self.folder, self.number, self.label, self.changed = folder, number, folder.name, 0
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] | None = None
        self.status: dict[str, Any] = {"state": WAITING}
        self._most_rows, self._wanted = max(2, most_rows), set(columns) if columns is not None else None
        self._offsets: dict[str, Any] | None = None
        self._signature: Any = None
        self._forget()

    def _forget(self) -> None:
        self.steps, self.columns = list[int](), dict[str, list[Any]]()
        self.evaluations, self.events = list[dict[str, Any]](), list[dict[str, Any]]()
        self.sample: dict[str, Any] | None = None
        self._plan: dict[str, Any] = {}
        self._last: dict[str, Any] = {}  # the newest row
        self._every, self._read = 1, 0  # rows that were read, and of how many one is kept
        self._history: list[tuple[int, int, int, int]] = []  # (moment, rows, evaluations, events) since everything was last sent

    def refresh(self, moment: int) -> None:
        """Reads what is new. moment: a number that grows; what changes now is new to those who knew an earlier one."""
        signature = self._stamps()
        if signature != self._signature:
            try:
                self._take(moment)
                self._signature = self._stamps() if self._signature is None else signature  # where its logs lie is known by now
            except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
                self._signature = None  # gone, or torn while it is written: the next time says more
        status = self._now()
        if status != self.status:
            self.status, self.changed = status, moment

    def _stamps(self) -> list[Any]:
        """What changes whenever the run's files do."""
        return [_stamp(path) for path in (*(self._logs / name for name in LOGS), *(self.folder / name for name in FILES))]

    @property
    def _logs(self) -> Path:
        return Path(str(self.config.get("log.log_dir") or self.folder))

    def _take(self, moment: int) -> None:
        found = read_run(self.folder, self._offsets)
        if found["restarted"]:
            found = read_run(self.folder)
            self._forget()
        self._offsets, self.config, self.summary = found["offsets"], found["config"], found["summary"]
        self._plan = found["plan"] or {}
        self._add_rows(found["steps"], found["columns"])
        self.evaluations += found["evals"]
        self.events += found["events"]
        self.sample = found["samples"][-1] if found["samples"] else self.sample
        for kept, most in ((self.evaluations, self._most_rows), (self.events, MOST_EVENTS)):
            if len(kept) > most:
                del kept[: len(kept) - most // 2]
                self._history.clear()
        self._history.append((moment, len(self.steps), len(self.evaluations), len(self.events)))
        del self._history[:-HISTORY]
        self.changed = moment

    def _add_rows(self, steps: list[int], columns: dict[str, list[Any]]) -> None:
        if steps:
            self._last = {"step": steps[-1], **{name: values[-1] for name, values in columns.items()}}
        for i, step in enumerate(steps):
            self._read += 1
            if (self._read - 1) % self._every:
                continue
            for name in columns:
                if (self._wanted is None or name in self._wanted) and name not in self.columns:
                    self.columns[name] = [None] * len(self.steps)
            for name, kept in self.columns.items():
                kept.append(columns[name][i] if name in columns else None)
            self.steps.append(step)
            if len(self.steps) > self._most_rows:
                self._every *= 2
                self.steps = self.steps[::2]
                self.columns = {name: kept[::2] for name, kept in self.columns.items()}
                self._history.clear()

    # ---- what it is at ----

    def _now(self) -> dict[str, Any]:
        last, plan, summary = self._last, self._plan, self.summary or {}
        state, reason = self._state()
        step = (state not in ACTIVE and summary.get("step")) or last.get("step") or next((event["step"] for event in reversed(self.events) if isinstance(event.get("step"), int)), 0)
        most = plan.get("max_steps")
        saved = [event["step"] for event in self.events if event.get("event") == "saved" and isinstance(event.get("step"), int)]
        seconds = last.get("seconds")
        left = None
        if state == TRAINING and isinstance(most, int) and isinstance(seconds, (int, float)) and step:
            left = seconds / step * max(0, most - step)
        return {"state": state, "reason": reason, "step": step, "max_steps": most, "seconds_left": left, "last": last,
                "saved": saved[-1] if saved else None, "metric": self._metric()}  # fmt: skip

    def _metric(self) -> str:
        """What the run is ranked by; while it trains for the first time, what is most likely that."""
        named = (self.summary or {}).get("ranking_metric")
        scored = [name for row in self.evaluations[-1:] for name in row]
        return str(named) if named else next((name for name in ("bpb", "loss", *self.columns) if name in (*scored, *self.columns)), "loss")

    def _state(self) -> tuple[str, str]:
        """(what the run is doing, why it ended where it ended)."""
        if not self.folder.is_dir():
            return GONE, ""
        held, ended = holder(self.folder) is not None, self._ended()
        if held and not ended:
            return (TRAINING, "") if self._last and self._signature is not None and self._begun() else (PREPARING, "")
        if ended or self._only_touched():
            reason = next((str(event.get("reason", "")) for event in reversed(self.events) if event.get("event") in ("stopped", "finished")), "")
            return str((self.summary or {}).get("status", "ended")), reason
        return (INTERRUPTED, "") if self._last or (self.folder / LOCK_FILE).exists() else (WAITING, "")

    def _ended(self) -> bool:
        """Whether the last process wrote how it ended: a summary that is newer than its lock."""
        summary, lock = _stamp(self.folder / "summary.json"), _stamp(self.folder / LOCK_FILE)
        return self.summary is not None and summary is not None and (lock is None or summary[1] >= lock[1])

    def _only_touched(self) -> bool:
        """Whether the process that took the lock after the run had ended did nothing (it was refused): the newest event is the end that
        the summary tells of, and no later step was logged. Whatever trains says "started" or "resumed" first."""
        end, summary = (self.events or [{}])[-1], self.summary or {}
        if end.get("event") not in ("finished", "stopped") or (end["event"], end.get("step")) != (summary.get("status"), summary.get("step")):
            return False
        return int(self._last.get("step") or 0) <= int(end.get("step") or 0)

    def _begun(self) -> bool:
        """Whether the process that holds the run has logged a step: the log is newer than the lock."""
        lock = _stamp(self.folder / LOCK_FILE)
        newest = max((stamp[1] for name in LOGS[:2] if (stamp := _stamp(self._logs / name)) is not None), default=0)
        return lock is None or newest >= lock[1]

    # ---- what is told ----

    def called(self, label: str, moment: int) -> None:
        if label != self.label:
            self.label, self.changed = label, moment

    def news(self, known: int) -> dict[str, Any] | None:
        """What changed after the moment `known`; None where nothing did. "from" says after how many rows, evaluations and events
        the new ones go; 0, 0, 0 replaces all that was known."""
        if self.changed <= known:
            return None
        rows, evaluations, events = next((one[1:] for one in reversed(self._history) if one[0] <= known), (0, 0, 0))
        told = {"number": self.number, "label": self.label, "folder": str(self.folder), "status": self.status,
                "from": {"rows": rows, "evals": evaluations, "events": events}, "steps": self.steps[rows:],
                "columns": {name: kept[rows:] for name, kept in self.columns.items()}, "evals": self.evaluations[evaluations:],
                "events": self.events[events:], "sample": self.sample}  # fmt: skip
        return told if rows else {**told, "config": self.config, "summary": self.summary}


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """(inode, nanoseconds of the last change, bytes), None where nothing is."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
