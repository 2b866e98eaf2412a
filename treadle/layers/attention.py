"""Multi-head self-attention with grouped queries, rotary positions, optional query-key norm, and a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from treadle.layers.context import Context
from treadle.layers.norm import RMSNorm
from treadle.layers.rope import rotate
from treadle.layers.state import KeyValueCache, LayerState
from treadle.layers.token_mixers import TokenMixer
from treadle.ops.attention import cached_attention, causal_attention


class Attention(TokenMixer):
    """softmax(q k^T / sqrt(E)) v (Vaswani et al. 2017), keys and values shared by groups of heads (arXiv 2305.13245)."""

    def __init__(
        self, width: int, heads: int, groups: int, head_width: int, *, bias: bool = False, out_bias: bool = False,
        qk_norm: bool = False, eps: float = 1e-6, dropout: float = 0.0, linear: type[nn.Linear] = nn.Linear,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.groups, self.head_width, self.dropout = heads, groups, head_width, dropout
        self.query = linear(width, heads * head_width, bias=bias)
        self.key = linear(width, groups * head_width, bias=bias)
        self.value = linear(width, groups * head_width, bias=bias)
        self.out = linear(heads * head_width, width, bias=out_bias)
        self.query_norm = RMSNorm(head_width, eps) if qk_norm else None
        self.key_norm = RMSNorm(head_width, eps) if qk_norm else None

    @classmethod
    def from_config(cls, config: Any, layer: int) -> Attention:
        bias = config.style == "gpt2"
        return cls(
            config.hidden_size, config.num_heads, config.groups, config.width_of_head, bias=bias, out_bias=bias,
            qk_norm=config.qk_norm, eps=config.norm_eps, dropout=config.attention_dropout,
        )  # fmt: skip

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LayerState:
        return KeyValueCache.empty(rows, self.groups, max_len, self.head_width, device, dtype)

    def flops(self, length: int) -> int:
        projections = sum(layer.in_features * layer.out_features for layer in self.children() if isinstance(layer, nn.Linear))
        scores = 2 * self.heads * self.head_width * length  # q k^T and p v, a multiply-add each
        return 2 * length * (projections + scores)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        rows, length, _ = x.shape
        return x.view(rows, length, heads, self.head_width).transpose(1, 2)  # [B, H, T, E]

    def forward(self, x: Tensor, context: Context, cache: KeyValueCache | None = None) -> Tensor:
        rows, length, _ = x.shape
        q, k = self._split(self.query(x), self.heads), self._split(self.key(x), self.groups)
        v = self._split(self.value(x), self.groups)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        if cache is not None:
            assert context.token_positions is not None
            keys, values = cache.append(k, v, context.token_positions, context.used)
            y = cached_attention(q, keys.to(q.dtype), values.to(q.dtype), context.token_positions.position_ids)
        else:
            dropout = self.dropout if self.training else 0.0
            y = causal_attention(q, k, v, doc_ids=context.doc_ids, segments=context.segments, dropout=dropout)
        return self.out(y.transpose(1, 2).reshape(rows, length, self.heads * self.head_width))
