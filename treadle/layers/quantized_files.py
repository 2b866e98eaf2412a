"""Quantised linear layers as files hold them: layer X has X.weight.codes and X.weight.scales instead of X.weight.

int8: codes int8 [N, K], scales fp32 [N]. int4: codes uint8 [N, K / 2] (k even in the low bits; 8 is zero), scales fp16
[N, K / 32]. ops/packed_linear.py says what they mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from treadle.errors import CheckpointError
from treadle.ops.packed_linear import GROUP, Quantized

CODES, SCALES = ".weight.codes", ".weight.scales"


def to_tensors(layers: dict[str, Quantized]) -> dict[str, Tensor]:
    """Module name -> matrix, as named tensors. X.weight.codes [N, K] (int4: [N, K / 2]), X.weight.scales [N] or [N,
    groups]."""
    out = {}
    for name, quantized in layers.items():
        assert quantized.scales is not None, quantized.kind
        out[name + CODES], out[name + SCALES] = quantized.codes, quantized.scales
    return out


def from_tensors(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Quantized]:
    """The inverse. shapes: of each layer's weight; CheckpointError for codes or scales of other ones, or of no such layer.
    Codes [N, K] and scales as `to_tensors` gives them."""
    found = {}
    for key, codes in tensors.items():
        if not key.endswith(CODES):
            continue
        name, shape = key.removesuffix(CODES), shapes.get(key.removesuffix(CODES))
        scales = tensors.get(name + SCALES)
        if shape is None or len(shape) != 2 or scales is None:
            raise CheckpointError(f"{key} belongs to no linear layer of this model")
        rows, columns = shape
        eight = (torch.int8, (rows, columns), torch.float32, (rows,))
        four = (torch.uint8, (rows, columns // 2), torch.float16, (rows, columns // GROUP))
        given = (codes.dtype, tuple(codes.shape), scales.dtype, tuple(scales.shape))
        if given != eight and (given != four or columns % GROUP):
            raise CheckpointError(f"quantised weights of {name} {list(codes.shape)} are not those of a matrix {list(shape)}")
        found[name] = Quantized("int8" if given == eight else "int4", codes, scales)
    return found


def unpack(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Quantized]]:
    """(weights by their own names in fp32, the quantised ones as they were). A tensor that two modules share, as of a tied
    head, keeps its own where the file has it. Weights [N, K]."""
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantized = from_tensors(tensors, shapes)
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith((CODES, SCALES))}
    own = set(dict(model.named_parameters()))
    for name, matrix in quantized.items():
        if f"{name}.weight" in own:
            out[f"{name}.weight"] = matrix.dequantize()
    return out, quantized


def pack(model: nn.Module, tensors: dict[str, Tensor], layers: dict[str, Quantized]) -> dict[str, Tensor]:
    """A model's weights with these layers quantised. What else reads a layer's weight (a tied embedding) keeps it, in bf16.
    Weights [N, K]."""
    own = set(dict(model.named_parameters()))
    out = {name: tensor for name, tensor in tensors.items() if name.removesuffix(".weight") not in layers}
    for name in layers.keys() - {n.removesuffix(".weight") for n in own}:  # shared: under its first name it is still here
        weight = model.get_submodule(name).weight
        for key, parameter in model.named_parameters():
            if parameter is weight and key in out:
                out[key] = out[key].to(torch.bfloat16)
    return {**out, **to_tensors(layers)}
