"""A linear layer with 8-bit products while it trains (training/resolve.use_fp8 puts it into a model)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treadle.ops.fp8 import fp8_linear


class Fp8Linear(nn.Linear):
    """nn.Linear whose products are of 8-bit floats in training; in evaluation it is nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if not in_8_bits(self):
            return super().forward(x)
        y = fp8_linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def in_8_bits(*layers: nn.Module) -> bool:
    """Whether calling these multiplies 8-bit floats: Fp8Linear in training."""
    return torch.is_grad_enabled() and all(isinstance(layer, Fp8Linear) and layer.training for layer in layers)
