"""Layers whose output in evaluation does not depend on what else is in the batch, to the last bit.

A sum of floats depends on how it is blocked, and so on how many rows and positions there are; a difference in the last bit
then moves a rounding to int8 or a chunk boundary, and decoding parts from the full forward pass. Without gradients these
layers compute in fp64 and round once: other orders of adding then agree, but for about one number in 10^9.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.norm import RMSNorm
from treadle.layers.weight_cache import ModuleWithWeightCache, weight_version
from treadle.ops.precision import without_autocast
from treadle.ops.rms_norm import rms_norm_same_dtype
from treadle.ops.ternary import rms_norm_rounded_once


def to_reproducible(x: Tensor) -> Tensor:
    """fp32 where gradients are wanted, else fp64. x of any shape."""
    return x.float() if torch.is_grad_enabled() else x.double()


def reproducible_sigmoid(x: Tensor) -> Tensor:
    """Without gradients in fp64, rounded to x's type: torch's vector and scalar forms of exp differ in the last bit, and
    which of them an element gets depends on how many there are."""
    return torch.sigmoid(x) if torch.is_grad_enabled() else torch.sigmoid(x.double()).to(x.dtype)


def reproducible_silu(x: Tensor) -> Tensor:
    """The same for silu. x of any shape."""
    return F.silu(x) if torch.is_grad_enabled() else F.silu(x.double()).to(x.dtype)


def reproducible_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, fp32; without gradients computed in fp64 and rounded once. x [...,
    D], weight [D]."""
    return rms_norm_same_dtype(x.float(), weight, eps) if torch.is_grad_enabled() else rms_norm_rounded_once(x, weight, eps)


class ReproducibleRMSNorm(RMSNorm):
    """RMSNorm; without gradients in fp64, rounded to fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return super().forward(x) if torch.is_grad_enabled() else reproducible_rms_norm(x, self.weight, self.eps)


class ReproducibleLinear(ModuleWithWeightCache, nn.Linear):
    """nn.Linear; without gradients in fp64, rounded to fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        w = self.weight
        if torch.is_grad_enabled() or w.is_meta or type(w.data) is not Tensor:
            self.clear_weight_cache()
            # Weights gathered in 16 bits meet a router's fp32.
            return F.linear(x, w.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None)
        weight = self.cached((weight_version(w), w.data_ptr(), w.device), w.double)
        with without_autocast(x):
            bias = self.bias.double() if self.bias is not None else None
            return F.linear(x.double(), weight, bias).float()
