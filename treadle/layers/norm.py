"""Normalisation layers. Their weights are vectors, so no weight decay rule ever touches them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Weights gathered in 16 bits meet a residual stream in fp32.
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def make_norm(kind: str, width: int, eps: float, bias: bool = True) -> nn.Module:
    return RMSNorm(width, eps) if kind == "rms" else LayerNorm(width, eps, bias)
