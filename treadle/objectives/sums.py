"""Loss terms added up over steps: what a row of the training log is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LossSums:
    """Sums since the last row. Tensors stay on the device until a row is due.

    means: each term's mean over steps. totals: each term times the count of its unit, so that totals[name] /
    counts[unit] is the mean over everything since the last row. counts: of each unit.
    """

    counts: dict[str, int]

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        self.clear()
        for name, value in (saved or {}).get("sums", {}).items():
            self._sums[name] = torch.tensor(value, dtype=torch.float64)
        for name, value in (saved or {}).get("totals", {}).items():
            self._totals[name] = torch.tensor(value, dtype=torch.float64)
        self.counts = {name: int(value) for name, value in (saved or {}).get("counts", {}).items()}
        self.steps = int((saved or {}).get("steps", 0))

    def clear(self) -> None:
        """Begins a new row."""
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self.counts = {}
        self.steps = 0

    def add(self, losses: dict[str, Tensor], units: dict[str, str], counts: dict[str, int]) -> None:
        """One step: its terms (already divided), the unit of each, and how many of each unit there were."""
        for name, value in losses.items():
            wide = value.double()
            self._sums[name] = _onto(self._sums.get(name), wide)
            self._totals[name] = _onto(self._totals.get(name), wide * counts[units[name]])
        for unit, count in counts.items():
            self.counts[unit] = self.counts.get(unit, 0) + count
        self.steps += 1

    @property
    def means(self) -> dict[str, float]:
        """Term -> its mean over the steps."""
        return {name: float(total) / max(1, self.steps) for name, total in self._sums.items()}

    @property
    def totals(self) -> dict[str, float]:
        """Term -> its mean times the count of its unit, summed."""
        return {name: float(total) for name, total in self._totals.items()}

    def to_json(self) -> dict[str, Any]:
        """The sums so far, for run_state.json."""
        return {"sums": {name: float(v) for name, v in self._sums.items()}, "totals": self.totals, "counts": self.counts,
                "steps": self.steps}  # fmt: skip


def _onto(before: Tensor | None, value: Tensor) -> Tensor:
    return value if before is None else before.to(value.device) + value
