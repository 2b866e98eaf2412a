"""`log.health`: how large each block's gradients and activations are, measured only at steps that are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treadle.distributed.base import Strategy
from treadle.models.base import Model
from treadle.ops.sharding import local


class Inspection:
    """Root mean squares by block; `on` is set by the trainer before a step that will be logged."""

    def __init__(self, model: Model, strategy: Strategy) -> None:
        self.strategy = strategy
        self.on = False
        self.blocks = model.blocks()
        self.activations: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            block.register_forward_hook(lambda module, inputs, out, index=index: self._see(index, out))  # type: ignore[misc]

    def _see(self, index: int, out: Any) -> None:
        if self.on and isinstance(out, Tensor):
            self.activations[index] = out.detach().float().pow(2).mean().sqrt()

    def row(self) -> dict[str, float]:
        """Columns for the log: activation_rms_block_N and gradient_rms_block_N."""
        found = {f"activation_rms_block_{n}": float(value) for n, value in sorted(self.activations.items())}
        for index, block in enumerate(self.blocks):
            found[f"gradient_rms_block_{index}"] = self._gradient_rms(block)
        return found

    def _gradient_rms(self, block: nn.Module) -> float:
        gradients = [p.grad for p in block.parameters() if p.grad is not None]
        if not gradients:
            return 0.0
        norms = torch.stack([torch.linalg.vector_norm(local(g).float()) for g in gradients])
        norm = self.strategy.global_norm(torch.linalg.vector_norm(norms))
        return float(norm / sum(g.numel() for g in gradients) ** 0.5)
