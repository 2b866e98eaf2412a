"""Layers whose evaluation gives a row the same bits whatever shares its pass.

Sums of floats depend on how they are blocked, which depends on how many rows and places there are; a last bit then moves a
rounding to int8 or a boundary, and decoding parts from the full forward pass. Without gradients these layers compute in
fp64 and round once: other orders of adding then agree, but for about one number in 10^9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.norm import RMSNorm
from treadle.ops.ternary import native

SMALL = 1 << 16  # numbers: up to here one call into C costs less than seven operations of torch


def exact(x: Tensor) -> Tensor:
    """fp32 where gradients are wanted, else fp64."""
    return x.float() if torch.is_grad_enabled() else x.double()


def evenly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """sigmoid or silu: torch's vector and scalar forms of exp differ in the last bit, and which of them an element gets depends
    on how many there are."""
    return function(x) if torch.is_grad_enabled() else function(x.double()).to(x.dtype)


def mean_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, fp32."""
    plain = type(x) is Tensor and x.device.type == "cpu" and weight.dim() == 1
    if plain and not torch.is_grad_enabled() and x.numel() <= SMALL and native() is not None:
        x, weight, out = x.float().contiguous(), weight.float().contiguous(), torch.empty(x.shape)
        native().rms_normed(x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), x.numel() // x.shape[-1], x.shape[-1])  # type: ignore[union-attr]
        return out
    wide = exact(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).float()


class ExactRMSNorm(RMSNorm):
    """RMSNorm; without gradients fp64 rounded to fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else mean_normed(x, self.weight, self.eps)


class Keeping(nn.Module):
    """A module that keeps something made of its weights for evaluation.

    It is made anew when the weights change, which their versions and addresses tell, when training goes on after an
    evaluation, and after a pass of training: fused optimisers and processes that share weights write them without a trace. (So
    does who writes `parameter.data`.)
    """

    _kept: Any = None

    def forget(self) -> None:
        """Called in every pass of training."""
        if self._kept is not None:
            self._kept = None

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has weights of its own


def version(t: Tensor) -> int:
    """Counts writes; tensors made for inference (weights gathered from shards) do not say."""
    return -1 if t.is_inference() else t._version


class ExactLinear(Keeping, nn.Linear):
    """nn.Linear; without gradients fp64 rounded to fp32."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if torch.is_grad_enabled() or w.is_meta or type(w.data) is not Tensor:
            self.forget()
            # Weights gathered in 16 bits meet a router's fp32.
            return F.linear(x, w.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None)
        mark = (version(w), w.data_ptr(), w.device)
        if self._kept is None or self._kept[0] != mark:
            self._kept = (mark, w.double())
        with torch.autocast(x.device.type, enabled=False):
            bias = self.bias.double() if self.bias is not None else None
            return F.linear(x.double(), self._kept[1], bias).float()
