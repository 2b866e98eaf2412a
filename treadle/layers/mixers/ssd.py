"""The mixer of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7 and figure 6)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.context import Context
from treadle.layers.mixers.parts import (
    DecayMixer,
    HeadNorm,
    MatrixState,
    convolved,
    decayed,
    heads_of,
    joined,
    past_of,
    short_convolution,
    wide,
    wide_linear,
)
from treadle.layers.state import LayerState
from treadle.ops.precision import without_autocast
from treadle.ops.ssd import ssd_flops


class SSD(DecayMixer):
    """[x, b, c] = silu(convolution(I u)), dt = softplus(S u), H_t = exp(-exp(A) dt_t) H_{t-1} + b_t (x) dt_t x_t,
    y = O norm((c_t . H_t + D x_t) * silu(G u)): one decay a head, b and c shared by all heads."""

    read_in_place = ("step",)

    def __init__(self, width: int, inner: int, heads: int, state_size: int, *, convolution: int, eps: float) -> None:
        super().__init__()
        self.inner, self.heads, self.state_size = inner, heads, state_size
        self.input = nn.Linear(width, inner + 2 * state_size, bias=False)
        self.convolution = short_convolution(inner + 2 * state_size, convolution)
        self.gate = nn.Linear(width, inner, bias=False)
        self.step = nn.Linear(width, heads)
        self.rate = nn.Parameter(torch.zeros(heads))  # A
        self.skip = nn.Parameter(torch.ones(heads))  # D
        self.norm = HeadNorm(inner, 1, eps)
        self.out = nn.Linear(inner, width, bias=False)

    @classmethod
    def from_config(cls, config: Any, layer: int) -> SSD:
        return cls(
            config.hidden_size, config.expanded(2) * config.hidden_size, config.num_heads, config.state_size,
            convolution=config.convolution_size, eps=config.norm_eps,
        )  # fmt: skip

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LayerState:
        past = past_of(self.convolution, rows, self.inner + 2 * self.state_size)
        return MatrixState.empty((rows, self.heads, self.state_size, self.inner // self.heads), past, device, dtype)

    def flops(self, length: int) -> int:
        products = self.gate.in_features * (3 * self.inner + 2 * self.state_size + self.heads)
        return 2 * length * products + ssd_flops(length, self.heads, self.state_size, self.inner // self.heads, shared=True)

    def forward(self, x: Tensor, context: Context, state: MatrixState | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a state, x continues the tokens it holds."""
        mixed, gate = self.input(x), self.gate(x)
        with without_autocast(x):
            mixed = convolved(self.convolution, wide(mixed), context, state)
            inputs, b, c = mixed.split([self.inner, self.state_size, self.state_size], -1)
            inputs, b, c = heads_of(inputs, self.heads), heads_of(b, 1), heads_of(c, 1)
            dt = F.softplus(wide_linear(self.step, x)).transpose(1, 2)  # [B, H, T]
            log_decay = -wide(self.rate).exp()[:, None] * dt
            y = decayed(inputs * dt[..., None], log_decay, b, c, context, state, dtype=gate.dtype)
            y = joined(y + wide(self.skip)[:, None, None] * inputs)
            y = self.norm.gated(y, wide(gate), after=True)
        return self.out(y.to(x.dtype))
