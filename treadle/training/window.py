"""Sums between two log rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from treadle.evaluation.evaluator import LN2
from treadle.training.run_state import RunState
from treadle.training.step import StepResult


class Window:
    """Sums since the last log row. They go into the checkpoint, so that the first row after a resume is the row that an
    uninterrupted run would have written. Sums stay on the device until a row is due."""

    def __init__(self, state: RunState) -> None:
        self.reset()
        for name, value in state.window.get("sums", {}).items():
            self.sums[name] = torch.tensor(value, dtype=torch.float64)
        self.added, self.labels, self.bytes = (int(state.window.get(k, 0)) for k in ("added", "labels", "bytes"))
        self.nats = torch.tensor(float(state.window.get("nats", 0.0)), dtype=torch.float64)

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.nats = torch.zeros((), dtype=torch.float64)
        self.added = self.labels = self.bytes = self.steps = self.step_tokens = 0
        self.step_seconds = 0.0

    def add(self, result: StepResult) -> None:
        for name, value in result.losses.items():
            self.sums[name] = (
                self.sums.get(name, torch.zeros((), dtype=torch.float64)).to(value.device) + value.double()
            )
        main = next(iter(result.losses.values()))
        self.nats = self.nats.to(main.device) + main.double() * result.counts["labels"]
        self.added += 1
        self.labels += result.counts["labels"]
        self.bytes += result.counts.get("bytes", 0)

    def means(self) -> dict[str, float]:
        return {name: float(total) / max(1, self.added) for name, total in self.sums.items()}

    def bits_per_byte(self) -> float | None:
        return float(self.nats) / LN2 / self.bytes if self.bytes else None

    def to_json(self) -> dict[str, Any]:
        return {"sums": {name: float(v) for name, v in self.sums.items()}, "nats": float(self.nats), "added": self.added,
                "labels": self.labels, "bytes": self.bytes}  # fmt: skip
