"""What a run remembers besides weights: plain numbers that go into run_state.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from treadle.errors import CheckpointError


@dataclass
class RunState:
    """The position and the counters of a run. Data order and randomness are functions of `step`, so they are not here."""

    step: int = 0  # optimiser steps done
    tokens: int = 0  # symbols seen
    skipped_steps: int = 0
    consecutive_skips: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0  # evaluations since the best one
    ended: str = ""  # why training ended before its last step (early stopping), if it did
    best_loss: float | None = None  # of early stopping, which looks at the loss whatever picks the best checkpoint
    seconds: float = 0.0  # spent training, over all starts
    rollbacks: int = 0
    data_offset: int = 0  # steps of data skipped by rollbacks: step s reads the rows of s + data_offset
    settings: dict[str, Any] = field(default_factory=dict)  # keys set while it ran, by `set KEY=VALUE`
    health: dict[str, Any] = field(default_factory=dict)
    loss_scale: dict[str, Any] = field(default_factory=dict)  # of fp16
    evaluated_step: int = 0  # the last step that was evaluated
    window: dict[str, Any] = field(default_factory=dict)  # sums since the last log row
    threads: int = 0
    data_fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(table: dict[str, Any]) -> RunState:
        known = {f.name for f in fields(RunState)}
        if not isinstance(table.get("step"), int) or set(table) - known:
            raise CheckpointError("run_state.json is not a run state of this version of treadle")
        return RunState(**table)
