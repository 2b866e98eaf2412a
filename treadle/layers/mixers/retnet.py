"""Retention (RetNet, Sun et al. 2023, arXiv 2307.08621): linear attention with one fixed decay a head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from treadle.layers.context import Context
from treadle.layers.mixers.parts import HeadNorm, MatrixState, decayed, heads_of, joined, wide
from treadle.layers.rope import rotate
from treadle.layers.state import LayerState
from treadle.layers.token_mixers import TokenMixer
from treadle.ops.precision import without_autocast
from treadle.ops.ssd import ssd_flops


class RetNet(TokenMixer):
    """y = O (silu(G x) * norm(sum_s gamma^(t-s) (R_t q_t . R_s k_s) v_s)), each head with its gamma = 1 - 2^(-5) .. 1 - 2^(-9)
    (eq. 8; a memory of 32 to 512 positions) and its own norm; R turns where the model has rotary positions."""

    def __init__(self, width: int, heads: int, head_width: int, value_width: int, *, eps: float) -> None:
        super().__init__()
        self.heads, self.head_width, self.value_width = heads, head_width, value_width
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key = nn.Linear(width, heads * head_width, bias=False)
        self.value = nn.Linear(width, heads * value_width, bias=False)
        self.gate = nn.Linear(width, heads * value_width, bias=False)
        self.norm = HeadNorm(heads * value_width, heads, eps, centred=True)
        self.out = nn.Linear(heads * value_width, width, bias=False)

    @classmethod
    def from_config(cls, config: Any, layer: int) -> RetNet:
        e = config.width_of_head
        return cls(config.hidden_size, config.num_heads, e, config.expanded(2) * e, eps=config.norm_eps)

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LayerState:
        return MatrixState.empty((rows, self.heads, self.head_width, self.value_width), (rows, 0, 0), device, dtype)

    def flops(self, length: int) -> int:
        products = self.query.in_features * self.heads * (2 * self.head_width + 3 * self.value_width)
        return 2 * length * products + ssd_flops(length, self.heads, self.head_width, self.value_width)

    def forward(self, x: Tensor, context: Context, state: MatrixState | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a state, x continues the tokens it holds."""
        q, k, v, gate = self.query(x), self.key(x), self.value(x), self.gate(x)
        dtype = v.dtype
        with without_autocast(x):
            q, k, v = (heads_of(wide(t), self.heads) for t in (q, k * self.head_width**-0.5, v))
            if context.rotary is not None:
                q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
            lost = torch.linspace(math.log(2.0**-5), math.log(2.0**-9), self.heads, device=x.device, dtype=q.dtype)
            log_decay = torch.log1p(-lost.exp())[None, :, None].expand(1, -1, x.shape[1])
            y = decayed(v, log_decay, k, q, context, state, dtype=dtype)
            y = self.norm.gated(joined(y), wide(gate))
        return self.out(y.to(x.dtype))
