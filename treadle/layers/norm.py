"""Normalisation layers. Their weights are vectors, so no weight decay rule ever touches them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.ops.residual import residual_sum
from treadle.ops.rms_norm import add_rms_norm, keep_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps)

    def keeping(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, its norm), for a residual stream that goes on; see ops/rms_norm.py. x [..., D]."""
        return keep_rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """(x + added, its norm). Both [..., D]."""
        return add_rms_norm(x, added, self.weight, self.eps)


def keeping(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x, norm(x)); one function where the norm has it. x [..., D]."""
    return norm.keeping(x) if type(norm) is RMSNorm else (x, norm(x))


def of_sum(norm: nn.Module, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """(x + added, norm(x + added)); one function where the norm has it. x and added [..., D]."""
    if type(norm) is RMSNorm:
        return norm.of_sum(x, added)
    x = residual_sum(x, added)
    return x, norm(x)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        # Weights gathered in 16 bits meet a residual stream in fp32.
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def make_norm(kind: str, width: int, eps: float, bias: bool = True) -> nn.Module:
    """The norm called `kind` ("rms" or "layer") over `width` channels; only a layer norm has a bias."""
    return RMSNorm(width, eps) if kind == "rms" else LayerNorm(width, eps, bias)
