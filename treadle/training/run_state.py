"""Changes nothing: what a run remembers besides weights, as plain numbers that go into run_state.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from treadle.errors import CheckpointError


@dataclass
class RunState:
    """The position and the counters of a run. Data order and randomness are functions of these, so neither is here."""

    step: int = 0  # optimiser steps done
    position: Any = None  # where the dataset goes on, as the dataset itself says it; None is its start
    tokens: int = 0  # real positions seen
    seconds: float = 0.0  # spent training, over all starts
    cpu_seconds: float = 0.0  # of this process and its threads meanwhile
    skipped_steps: int = 0
    rollbacks: int = 0
    ended: str = ""  # why training ended before max_steps, as the callback `ended_by` wanted it
    ended_by: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # keys set while it ran, by `set KEY=VALUE`
    loss_scale: dict[str, Any] = field(default_factory=dict)  # of fp16
    threads: int = 0
    data_fingerprint: str = ""
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)  # each one's state_dict, by name

    def advance(self, tokens: int, seconds: float, cpu_seconds: float) -> None:
        """One step is done."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.cpu_seconds += cpu_seconds

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for run_state.json."""
        return asdict(self)

    @staticmethod
    def from_json(table: dict[str, Any]) -> RunState:
        """The inverse of `to_json`, older forms too; CheckpointError for anything else."""
        if isinstance(table.get("step"), int) and "callbacks" not in table:
            table = _upgraded(table)
        known = {f.name for f in fields(RunState)}
        if not isinstance(table.get("step"), int) or set(table) - known:
            raise CheckpointError("run_state.json is not a run state of this version of treadle")
        return RunState(**table)


def _upgraded(table: dict[str, Any]) -> dict[str, Any]:
    """A state written before behaviours were callbacks with a state of their own (version 0.1 until November 2026)."""
    kept = {f.name: table[f.name] for f in fields(RunState) if f.name in table}
    window = table.get("window", {})
    totals = {next(iter(window["sums"])): window["nats"]} if window.get("sums") else {}
    sums = {"sums": window.get("sums", {}), "totals": totals, "steps": window.get("added", 0),
            "counts": {name: window.get(name, 0) for name in ("labels", "bytes")}}  # fmt: skip
    return {
        **kept,
        "position": table["step"] + table.get("data_offset", 0),
        "ended_by": "early_stopping" if table.get("ended") else "",
        "callbacks": {
            "progress": {"sums": sums},
            "evaluation": {"evaluated_step": table.get("evaluated_step", 0)},
            "best_model": {"value": table.get("best_metric"), "step": table.get("best_step")},
            "early_stopping": {"best": table.get("best_loss"), "stale": table.get("stale_evaluations", 0)},
            "recovery": {"consecutive": table.get("consecutive_skips", 0)},
            "health": table.get("health", {}),
        },
    }  # fmt: skip
