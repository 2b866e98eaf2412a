"""What the mixers with a matrix for a memory share: its decoding state, their types, norms and shifted inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.context import Context
from treadle.layers.hgrn import ShortConvolution
from treadle.layers.state import LayerState
from treadle.layers.token_mixers import TokenMixer
from treadle.ops.documents import document_starts
from treadle.ops.flash_linear_attention import flash
from treadle.ops.gates import NormKind, gated_norm
from treadle.ops.short_convolution import short_convolution as short_convolution_of
from treadle.ops.ssd import ssd, step


@dataclass
class MatrixState(LayerState):
    """memory [B, H, N, P] in fp32 (fp64 for a model in fp64); before [B, size - 1, channels], the last inputs of a short
    convolution or a token shift, oldest first."""

    memory: Tensor
    before: Tensor

    @staticmethod
    def empty(shape: tuple[int, ...], past: tuple[int, int, int], device: Any, dtype: Any) -> MatrixState:
        """Zeros: memory of `shape` [B, H, N, P], and the past [B, size - 1, channels] of a short convolution."""
        return MatrixState(torch.zeros(shape, device=device, dtype=wide_dtype(dtype)), torch.zeros(past, device=device, dtype=dtype))


def wide_dtype(dtype: Any) -> torch.dtype:
    """What a memory is kept and computed in: fp32, where 16 bits forget small additions; fp64 stays."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(t: Tensor) -> Tensor:
    """t (of any shape) in fp32, or in fp64 where it is: the type that memories and exponentials are computed in."""
    return t.to(wide_dtype(t.dtype))


def wide_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in fp32 whatever its weights were gathered in: for gates, whose exponentials 16 bits would spoil. Outside
    of autocast. x [..., K] -> [..., N]."""
    x = wide(x)
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype) if layer.bias is not None else None)


def heads_of(t: Tensor, heads: int) -> Tensor:
    """[B, T, H E] -> [B, H, T, E]."""
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(t: Tensor) -> Tensor:
    """[B, H, T, E] -> [B, T, H E]."""
    return t.transpose(1, 2).flatten(2)


class HeadNorm(nn.Module):
    """Norm of each of `parts` equal parts of the last dimension, with one weight a channel: RMS, or `centred` on the mean of
    the part with a bias (a group norm at each position)."""

    def __init__(self, width: int, parts: int, eps: float, centred: bool = False) -> None:
        super().__init__()
        self.parts, self.eps = parts, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if centred else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., parts * P] -> the same shape."""
        x = x.unflatten(-1, (self.parts, -1))
        if self.bias is not None:
            return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(x.dtype) + self.bias.to(x.dtype)
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight.to(x.dtype)

    def gated(self, x: Tensor, gate: Tensor, after: bool = False) -> Tensor:
        """norm(x) silu(gate), or (`after`) norm(x silu(gate)). x, gate [..., parts * P]."""
        kind: NormKind = "after" if after else "inside" if self.bias is None else "centred"
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return gated_norm(x, gate, self.weight.to(x.dtype), self.parts, self.eps, kind, bias)


class TokenShift(ShortConvolution):
    """y_t = x_{t-1}, zero for the first position of a document: a short convolution with nothing to learn."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.size = 2

    def _sum(self, x: Tensor, doc_ids: Tensor | None) -> Tensor:
        shifted = F.pad(x, (0, 0, 1, 0))[:, : x.shape[1]]
        return shifted if doc_ids is None else shifted.masked_fill(document_starts(doc_ids)[..., None], 0.0)


def shifted(layer: ShortConvolution | None, x: Tensor, context: Context, state: MatrixState | None) -> Tensor:
    """`layer`'s output for x [B, T, C], its last inputs kept in `state`; x itself without a layer."""
    if layer is None:
        return x
    y, kept = layer(x, context, state.before if state is not None else None)
    if state is not None and kept is not None:
        state.before = kept
    return y


def convolved(layer: ShortConvolution | None, x: Tensor, context: Context, state: MatrixState | None) -> Tensor:
    """silu of `shifted`. x [B, T, C] -> [B, T, C]."""
    if layer is None or state is not None:
        return F.silu(shifted(layer, x, context, state))
    return short_convolution_of(x, layer.weight, context.doc_ids, silu=True)


def decayed(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, context: Context, state: Any = None, name: str = "memory",
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """ops.ssd over documents, or going on from the memory called `name` in `state`: [B, H, T, P]. `dtype`: what the products
    around it are in, 16 bits being where kernels of a GPU may take over."""
    if state is None:
        y = flash("ssd", dtype, context.doc_ids, context.segments, x, log_decay, b, c)
        if y is not None:
            return y
        return ssd(x, log_decay, b, c, context.doc_ids, precise=True)[0]
    mask = token_mask(context)[:, None].to(x.dtype)  # padding: no decay, no input
    log_decay, b = log_decay * mask, b * mask[..., None]
    memory = getattr(state, name)
    if x.shape[2] == 1:
        memory = step(memory, x[:, :, 0], log_decay[:, :, 0], b[:, :, 0])
        y = c @ memory
    else:
        y, memory = ssd(x, log_decay, b, c, initial=memory, precise=True)
    setattr(state, name, memory.detach())
    return y


def token_mask(context: Context) -> Tensor:
    """bool [B, T] of a decoding context: True where a position holds a token, False for padding."""
    assert context.token_positions is not None
    return context.token_positions.token_mask


def short_convolution(channels: int, size: int) -> ShortConvolution | None:
    """The convolution over `size` positions of each channel; None for size 0, which asks for none."""
    return ShortConvolution(channels, size) if size else None


def past_of(convolution: ShortConvolution | None, rows: int, channels: int) -> tuple[int, int, int]:
    """The shape of a state's `before`."""
    return (rows, convolution.size - 1, channels) if convolution is not None else (rows, 0, 0)


class ConvolvedMixer(TokenMixer):
    """A mixer whose short convolution, `convolution`, starts as torch starts a convolution of each channel alone: uniform over
    +- 1 / sqrt(size)."""

    @classmethod
    def initial(cls, name: str, parameter: Tensor) -> float | str | Tensor | None:
        return float(3 * parameter.shape[1]) ** -0.5 if name == "convolution.weight" else None

    @classmethod
    def elementwise(cls, name: str) -> bool:
        return name == "convolution.weight"


class DecayMixer(ConvolvedMixer):
    """With Mamba-2's decay: `rate` (its logarithm) from 1 to 16, the steps softplus(`step.bias`) from .001 to .1, here in one
    order: memories from 1000 positions to less than one."""

    @classmethod
    def initial(cls, name: str, parameter: Tensor) -> float | str | Tensor | None:
        if name == "rate":
            return torch.linspace(1.0, 16.0, parameter.shape[0]).log()
        if name == "step.bias":
            step = torch.linspace(math.log(1e-3), math.log(1e-1), parameter.shape[0]).exp()
            return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
        return super().initial(name, parameter)
