"""What all contestants train: one GPT-2 shape, one text, the same tokens per step."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Task:
    """10.8M parameters at the default shape, bytes as tokens, 4096 tokens a step, AdamW."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    vocabulary: int = 256
    length: int = 256
    rows: int = 16
    steps: int = 10
    accumulation: int = 1  # ours alone: so many forward and backward passes a step, each over a part of the rows
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    seed: int = 0  # of the weights

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.length

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def data(self) -> np.ndarray:
        """The bundled text as bytes, uint8 [N]."""
        from bench.texts import novels

        return np.frombuffer(novels().encode(), dtype=np.uint8)

    def batch(self, data: np.ndarray, step: int) -> np.ndarray:
        """Rows of length + 1 tokens at random positions, int64 [rows, length + 1]."""
        starts = np.random.default_rng(step).integers(0, len(data) - self.length - 1, self.rows)
        return np.stack([data[s : s + self.length + 1] for s in starts]).astype(np.int64)


def train(task: Task, model: Any, optimizer: Any, loss_of: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """The loop of every contestant that is a loop; loss_of(inputs, labels), int64 [rows, length] each. -> the losses."""
    import torch

    data, losses = task.data(), []
    for step in range(task.steps):
        rows = torch.from_numpy(task.batch(data, step))
        loss = loss_of(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def arguments(description: str) -> tuple[argparse.Namespace, Task]:
    """The options every contestant takes, and what it trains."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--log", type=Path, required=True, help="where the hook writes a line a step")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32")
    parser.add_argument("--task", default="{}", help="fields of the task as JSON, where they differ from the usual ones")
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return given, Task(**json.loads(given.task))
