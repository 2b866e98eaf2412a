"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): a kernel instead of the exponential, so that keys and values
are summed into a matrix once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.context import Context
from treadle.layers.mixers.parts import decayed, heads_of, joined, wide, wide_dtype
from treadle.layers.rope import rotate
from treadle.layers.state import LayerState, expanded
from treadle.layers.token_mixers import TokenMixer
from treadle.ops.precision import without_autocast
from treadle.ops.ssd import ssd_flops


@dataclass
class LinearAttentionState(LayerState):
    """memory [B, H, E, E], sum of phi(k) (x) v; weights [B, H, E, 1], sum of phi(k); both in fp32."""

    memory: Tensor
    weights: Tensor


class LinearAttention(TokenMixer):
    """y_t = sum_s (R_t phi(q_t)) . (R_s phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s) over s <= t, phi = elu + 1; R turns by the
    positions where the model has rotary ones, above the line alone, so that the divisor stays positive (RoFormer, arXiv
    2104.09864, eq. 19)."""

    def __init__(self, width: int, heads: int, groups: int, head_width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.head_width = heads, groups, head_width
        self.query = nn.Linear(width, heads * head_width, bias=bias)
        self.key = nn.Linear(width, groups * head_width, bias=bias)
        self.value = nn.Linear(width, groups * head_width, bias=bias)
        self.out = nn.Linear(heads * head_width, width, bias=bias)

    @classmethod
    def from_config(cls, config: Any, layer: int) -> LinearAttention:
        return cls(config.hidden_size, config.num_heads, config.groups, config.width_of_head, bias=config.style == "gpt2")

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LayerState:
        shape = (rows, self.heads, self.head_width)
        return LinearAttentionState(*(torch.zeros(*shape, n, device=device, dtype=wide_dtype(dtype)) for n in (self.head_width, 1)))

    def flops(self, length: int) -> int:
        e = self.head_width
        projections = self.query.in_features * e * (2 * self.heads + 2 * self.groups)
        return 2 * length * projections + ssd_flops(length, self.heads, e, e) + ssd_flops(length, self.heads, e, 1)

    def forward(self, x: Tensor, context: Context, state: LinearAttentionState | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a state, x continues the tokens it holds."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        dtype = v.dtype
        with without_autocast(x):
            q, k, v = heads_of(wide(q), self.heads), heads_of(wide(k), self.groups), heads_of(wide(v), self.groups)
            q, k = (F.elu(t) + 1.0 for t in (q, k))
            v = expanded(v, self.heads // self.groups)
            turned_q, turned_k = (q, k) if context.rotary is None else (rotate(q, *context.rotary), rotate(k, *context.rotary))
            k, turned_k = (expanded(t, self.heads // self.groups) for t in (k, turned_k))
            no_decay = q.new_zeros(1, 1, q.shape[2])
            y = decayed(v, no_decay, turned_k, turned_q, context, state, dtype=dtype)
            y = y / (decayed(torch.ones_like(v[..., :1]), no_decay, k, q, context, state, "weights") + 1e-6)
        return self.out(joined(y).to(x.dtype))
