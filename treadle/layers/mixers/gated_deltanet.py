"""The mixer of Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464, section 3.4 and figure 1)."""

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
    heads_of,
    joined,
    past_of,
    short_convolution,
    token_mask,
    wide,
    wide_linear,
)
from treadle.layers.state import LayerState
from treadle.ops.delta_rule import delta_rule, delta_rule_flops, step
from treadle.ops.flash_linear_attention import flash
from treadle.ops.precision import without_autocast


class GatedDeltaNet(DecayMixer):
    """[q, k, v] = silu(convolution(x)), q and k of length 1, a = exp(-exp(A) softplus(S x)), beta = sigmoid(B x),
    H_t = a (I - beta k k^T) H_{t-1} + beta k (x) v, y = O (norm(q . H_t) * silu(G x)), the norm of each head alone."""

    read_in_place = ("step", "beta")

    def __init__(self, width: int, heads: int, head_width: int, value_width: int, *, convolution: int, eps: float) -> None:
        super().__init__()
        self.heads, self.head_width, self.value_width = heads, head_width, value_width
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key = nn.Linear(width, heads * head_width, bias=False)
        self.value = nn.Linear(width, heads * value_width, bias=False)
        self.gate = nn.Linear(width, heads * value_width, bias=False)
        self.convolution = short_convolution(self.channels, convolution)
        self.step = nn.Linear(width, heads)
        self.rate = nn.Parameter(torch.zeros(heads))
        self.beta = nn.Linear(width, heads, bias=False)
        self.norm = HeadNorm(heads * value_width, heads, eps)
        self.out = nn.Linear(heads * value_width, width, bias=False)

    @property
    def channels(self) -> int:
        """Channels of the short convolution: queries, keys and values side by side."""
        return self.heads * (2 * self.head_width + self.value_width)

    @classmethod
    def from_config(cls, config: Any, layer: int) -> GatedDeltaNet:
        e = config.width_of_head
        return cls(
            config.hidden_size, config.num_heads, e, config.expanded(2) * e, convolution=config.convolution_size, eps=config.norm_eps
        )

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LayerState:
        shape = (rows, self.heads, self.head_width, self.value_width)
        return MatrixState.empty(shape, past_of(self.convolution, rows, self.channels), device, dtype)

    def flops(self, length: int) -> int:
        products = self.query.in_features * self.heads * (2 * self.head_width + 3 * self.value_width + 2)
        return 2 * length * products + delta_rule_flops(length, self.heads, self.head_width, self.value_width)

    def forward(self, x: Tensor, context: Context, state: MatrixState | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a state, x continues the tokens it holds."""
        mixed, gate = torch.cat([self.query(x), self.key(x), self.value(x)], -1), self.gate(x)
        with without_autocast(x):
            mixed = convolved(self.convolution, wide(mixed), context, state)
            inner = self.heads * self.head_width
            q, k, v = (heads_of(t, self.heads) for t in mixed.split([inner, inner, self.heads * self.value_width], -1))
            q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
            log_decay = (-wide(self.rate).exp() * F.softplus(wide_linear(self.step, x))).transpose(1, 2)  # [B, H, T]
            beta = torch.sigmoid(wide_linear(self.beta, x)).transpose(1, 2)
            y = self._recur(q, k, v, log_decay, beta, context, state, gate.dtype)
            y = self.norm.gated(joined(y), wide(gate))
        return self.out(y.to(x.dtype))

    def _recur(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, context: Context, state: MatrixState | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        if state is None:
            y = flash("delta_rule", dtype, context.doc_ids, context.segments, q, k, v, log_decay, beta)
            return y if y is not None else delta_rule(q, k, v, log_decay, beta, context.doc_ids)[0]
        mask = token_mask(context)[:, None].to(v.dtype)  # padding: no decay, nothing replaced
        log_decay, beta = log_decay * mask, beta * mask
        if v.shape[2] == 1:
            memory = step(state.memory, k[:, :, 0], v[:, :, 0], log_decay[:, :, 0], beta[:, :, 0])
            y = q @ memory
        else:
            y, memory = delta_rule(q, k, v, log_decay, beta, initial=state.memory)
        state.memory = memory.detach()
        return y
