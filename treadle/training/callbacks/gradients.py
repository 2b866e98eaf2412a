"""Changes nothing; logs how large each block's gradients and activations are (log.health), measured only at steps that are
logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treadle.ops.sharding import local
from treadle.training.callbacks.base import Callback
from treadle.training.callbacks.progress import log_due
from treadle.training.context import Context


class Gradients(Callback):
    """Root mean squares by block, as columns activation_rms_block_N and gradient_rms_block_N."""

    name = "gradients"

    def __init__(self) -> None:
        self.on = False
        self.activations: dict[int, Tensor] = {}
        self.handles: list[Any] = []

    def wanted(self, context: Context) -> bool:
        return context.config.log.health

    def on_train_start(self, context: Context) -> None:
        for index, block in enumerate(context.model.blocks()):
            self.handles.append(block.register_forward_hook(lambda module, inputs, out, index=index: self._see(index, out)))

    def before_step(self, context: Context) -> None:
        self.on = log_due(context, context.step + 1)

    def _see(self, index: int, out: Any) -> None:
        if self.on and isinstance(out, Tensor):
            self.activations[index] = out.detach().float().pow(2).mean().sqrt()

    def columns(self, context: Context) -> dict[str, float]:
        found = {f"activation_rms_block_{n}": float(value) for n, value in sorted(self.activations.items())}
        for index, block in enumerate(context.model.blocks()):
            found[f"gradient_rms_block_{index}"] = self._gradient_rms(context, block)
        return found

    def _gradient_rms(self, context: Context, block: nn.Module) -> float:
        gradients = [p.grad for p in block.parameters() if p.grad is not None]
        if not gradients:
            return 0.0
        norms = torch.stack([torch.linalg.vector_norm(local(g).float()) for g in gradients])
        norm = context.strategy.global_norm(torch.linalg.vector_norm(norms))
        return float(norm / sum(g.numel() for g in gradients) ** 0.5)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
