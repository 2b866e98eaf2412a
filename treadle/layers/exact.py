"""Layers whose evaluation gives a row the same bits whatever shares its pass.

Sums of floats depend on how they are blocked, which depends on how many rows and places there are; a last bit then moves a
rounding to int8 or a boundary, and decoding parts from the full forward pass. Without gradients these layers compute in
fp64 and round once: other orders of adding then agree, but for about one number in 10^9.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.keeping import Keeping, version
from treadle.layers.norm import RMSNorm
from treadle.ops.precision import without_autocast
from treadle.ops.rms_norm import normed
from treadle.ops.ternary import rms_norm_once


def exact(x: Tensor) -> Tensor:
    """fp32 where gradients are wanted, else fp64."""
    return x.float() if torch.is_grad_enabled() else x.double()


def evenly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """sigmoid or silu: torch's vector and scalar forms of exp differ in the last bit, and which of them an element gets depends
    on how many there are."""
    return function(x) if torch.is_grad_enabled() else function(x.double()).to(x.dtype)


def mean_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, fp32."""
    return normed(x.float(), weight, eps) if torch.is_grad_enabled() else rms_norm_once(x, weight, eps)


class ExactRMSNorm(RMSNorm):
    """RMSNorm; without gradients fp64 rounded to fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else mean_normed(x, self.weight, self.eps)


class ExactLinear(Keeping, nn.Linear):
    """nn.Linear; without gradients fp64 rounded to fp32."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if torch.is_grad_enabled() or w.is_meta or type(w.data) is not Tensor:
            self.forget()
            # Weights gathered in 16 bits meet a router's fp32.
            return F.linear(x, w.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None)
        wide = self.kept((version(w), w.data_ptr(), w.device), w.double)
        with without_autocast(x):
            bias = self.bias.double() if self.bias is not None else None
            return F.linear(x.double(), wide, bias).float()
