"""Ternary weights as files hold them: five to a byte with one scale per layer, instead of fp32.

Layer X has X.weight.trits (uint8, five values of -1, 0, 1 as the digits of a number below 3^5 = 243) and X.weight.scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.errors import CheckpointError
from treadle.layers.bitlinear import BitLinear
from treadle.ops.ternary import quantize_weights

TRITS, SCALE = ".weight.trits", ".weight.scale"
DIGITS = (1, 3, 9, 27, 81)


def to_trits(ternary: Tensor) -> Tensor:
    """int8 of -1, 0, 1 in any shape -> uint8 [count / 5, rounded up]."""
    flat = ternary.reshape(-1) + 1
    flat = F.pad(flat, (0, -len(flat) % 5)).view(-1, 5)
    return (flat.to(torch.int32) * torch.tensor(DIGITS, dtype=torch.int32)).sum(1).to(torch.uint8)


def from_trits(codes: Tensor, shape: torch.Size) -> Tensor:
    """The inverse; CheckpointError when the codes are not those of `shape` values. codes: uint8 [ceil(N / 5)]."""
    if codes.dtype != torch.uint8 or codes.shape != (-(-shape.numel() // 5),) or int(codes.max()) >= 3**5:
        raise CheckpointError(f"packed weights {list(codes.shape)} are not those of a matrix {list(shape)}")
    digits = codes.to(torch.int32)[:, None] // torch.tensor(DIGITS, dtype=torch.int32) % 3
    return (digits.reshape(-1)[: shape.numel()].view(shape) - 1).to(torch.int8)


def ternary_layers(model: nn.Module) -> dict[str, BitLinear]:
    """Module name -> ternary layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


@torch.no_grad()
def pack(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights (it may be on the meta device itself) with its ternary layers packed. A packed layer [N, K]
    becomes codes uint8 [ceil(N K / 5)] and a scale."""
    out = dict(tensors)
    for name in ternary_layers(model):
        ternary, scale = quantize_weights(out.pop(f"{name}.weight").float())
        out[name + TRITS], out[name + SCALE] = to_trits(ternary), scale
    return out


def unpack(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """(weights by their own names, what `BitLinear.cache_quantized` takes). A packed layer's latent weight is one that rounds
    to it. Weights [N, K], codes int8 [N, K] and scales."""
    out, quantized = dict(tensors), {}
    for name, layer in ternary_layers(model).items():
        if name + TRITS in out and name + SCALE in out:
            ternary, scale = from_trits(out.pop(name + TRITS), layer.weight.shape), out.pop(name + SCALE)
            share = ternary.float().abs().mean()
            out[f"{name}.weight"] = ternary.float() * (scale / share if share > 0 else scale)
            quantized[name] = ternary, scale
    return out, quantized
