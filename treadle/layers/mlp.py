"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.linear import are_plain, outputs
from treadle.layers.lora import FrozenLinear
from treadle.ops.gelu import gelu_mlp
from treadle.ops.swiglu import gated_products, swiglu

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's own
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
    "silu": F.silu,
}


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202, eq. 6); other activations give its other kinds (GeGLU)."""

    def __init__(self, width: int, inner: int, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.fused = activation == "silu"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if self.fused and are_plain(self.gate, self.up, self.down):
            return swiglu(x, self.gate.weight, self.up.weight, self.down.weight)
        if self.fused and isinstance(self.down, FrozenLinear):
            return self.down(gated_products(self.gate(x), self.up(x)))
        gate, up = outputs(x, self.gate, self.up)
        return self.down(self.activation(gate) * up)


class MLP(nn.Module):
    """down(activation(up x))."""

    def __init__(self, width: int, inner: int, activation: str = "gelu_tanh", bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)
        self.activation = ACTIVATIONS[activation]
        self.fused = activation == "gelu_tanh"

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        if self.fused and are_plain(self.up, self.down, biased=True):
            return gelu_mlp(x, self.up.weight, self.down.weight, self.up.bias, self.down.bias)
        return self.down(self.activation(self.up(x)))
