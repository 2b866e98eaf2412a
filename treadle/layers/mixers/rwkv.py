"""The time mixing of RWKV-6 (Peng et al. 2024, arXiv 2404.05892, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treadle.layers.context import Context
from treadle.layers.mixers.parts import (
    HeadNorm,
    MatrixState,
    TokenShift,
    heads_of,
    joined,
    shifted,
    token_mask,
    wide,
    wide_linear,
)
from treadle.layers.state import LayerState
from treadle.layers.token_mixers import TokenMixer
from treadle.ops.flash_linear_attention import flash
from treadle.ops.precision import without_autocast
from treadle.ops.wkv import step, wkv, wkv_flops

MIXED = 5  # what has a shift of its own: decay, key, value, receptance, gate
# exp(-exp(5)) = 3e-65 is zero in fp32 already; beyond, the inner exponential would overflow and its gradient be no number.
LARGEST_DECAY = 5.0


class RWKV(TokenMixer):
    """Each input of [w, k, v, r, g] is x_t + (x_{t-1} - x_t) * (mu + L(x_t, x_{t-1})), L of low rank (eq. 12 to 16); the memory of
    each head decays by exp(-exp(d + W(x_w))) a channel, and y = O (norm(wkv(r, k, v)) * silu(g)) (eq. 17 to 19)."""

    read_in_place = ("decay_down", "decay_up")

    def __init__(self, width: int, heads: int, head_width: int, rank: int, *, eps: float) -> None:
        super().__init__()
        self.heads, self.head_width, self.rank = heads, head_width, rank
        inner = heads * head_width
        self.shift = TokenShift()
        self.mix_first = nn.Parameter(torch.zeros(width))
        self.mix = nn.Parameter(torch.zeros(MIXED * width))
        self.mix_down = nn.Linear(width, MIXED * rank, bias=False)
        self.mix_up = nn.Parameter(torch.zeros(MIXED, rank, width))
        self.decay_down = nn.Linear(width, rank, bias=False)
        self.decay_up = nn.Linear(rank, inner)
        self.bonus = nn.Parameter(torch.zeros(inner))
        self.receptance = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.norm = HeadNorm(inner, heads, eps, centred=True)
        self.out = nn.Linear(inner, width, bias=False)

    @classmethod
    def from_config(cls, config: Any, layer: int) -> RWKV:
        rank = min(config.low_rank_size, config.hidden_size)
        return cls(config.hidden_size, config.num_heads, config.width_of_head, rank, eps=config.norm_eps)

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LayerState:
        shape = (rows, self.heads, self.head_width, self.head_width)
        return MatrixState.empty(shape, (rows, 1, self.mix_first.shape[0]), device, dtype)

    def flops(self, length: int) -> int:
        width, inner = self.key.in_features, self.heads * self.head_width
        products = 5 * width * inner + 2 * MIXED * width * self.rank + self.rank * (width + inner)
        return 2 * length * products + wkv_flops(length, self.heads, self.head_width, self.head_width)

    def forward(self, x: Tensor, context: Context, state: MatrixState | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a state, x continues the tokens it holds."""
        change = shifted(self.shift, x, context, state) - x
        first = x + change * self.mix_first.to(x.dtype)
        low = torch.tanh(self.mix_down(first)).unflatten(-1, (MIXED, self.rank))  # [B, T, 5, R]
        low = low.flatten(0, 1).transpose(0, 1)  # [5, B T, R]
        mix = (low @ self.mix_up.to(low.dtype)).unflatten(1, x.shape[:2]) + self.mix.to(low.dtype).view(MIXED, 1, 1, -1)
        for_decay, for_key, for_value, for_receptance, for_gate = (x + change * mix.to(x.dtype)).unbind(0)
        k, v, r, gate = self.key(for_key), self.value(for_value), self.receptance(for_receptance), self.gate(for_gate)
        with without_autocast(x):
            decay = wide_linear(self.decay_up, torch.tanh(wide_linear(self.decay_down, for_decay)))
            log_decay = heads_of(-decay.clamp(max=LARGEST_DECAY).exp(), self.heads)
            r, k, v = (heads_of(wide(t), self.heads) for t in (r, k, v))
            y = self._recur(r, k, v, log_decay, wide(self.bonus).view(self.heads, -1), context, state, gate.dtype)
            y = self.norm.gated(joined(y), wide(gate))
        return self.out(y.to(x.dtype))

    def _recur(
        self, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, context: Context, state: MatrixState | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        if state is None:
            y = flash("wkv", dtype, context.doc_ids, context.segments, r, k, v, log_decay, bonus)
            return y if y is not None else wkv(r, k, v, log_decay, bonus, context.doc_ids)[0]
        mask = token_mask(context)[:, None, :, None].to(v.dtype)  # padding: no decay, no input
        log_decay, k = log_decay * mask, k * mask
        if v.shape[2] == 1:
            y, memory = step(state.memory, r[:, :, 0], k[:, :, 0], v[:, :, 0], log_decay[:, :, 0], bonus)
            y = y[:, :, None]
        else:
            y, memory = wkv(r, k, v, log_decay, bonus, initial=state.memory)
        state.memory = memory.detach()
        return y

    @classmethod
    def initial(cls, name: str, parameter: Tensor) -> float | str | Tensor | None:
        count = parameter.shape[0]
        if name == "decay_up.bias":  # from a memory of 400 positions to one of less than one (exp(6), exp(-1))
            return -6.0 + 5.0 * torch.linspace(0.0, 1.0, count) ** 1.35
        if name in ("mix_first", "mix"):  # the first channels see the position before alone, the last ones their own
            width = count // (MIXED if name == "mix" else 1)
            return (1.0 - torch.linspace(0.0, 1.0, width).sqrt()).repeat(count // width)
        return torch.full((count,), 0.5) if name == "bonus" else None

    @classmethod
    def undecayed(cls, name: str) -> bool:
        return name == "mix_up"
