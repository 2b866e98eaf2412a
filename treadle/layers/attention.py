"""Multi-head self-attention with grouped queries, rotary positions, optional query-key norm, and a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from treadle.layers.context import Context
from treadle.layers.linear import outputs
from treadle.layers.norm import RMSNorm
from treadle.layers.rope import rotate
from treadle.layers.state import KeyValueCache, LayerState, SlidingWindowCache
from treadle.layers.token_mixers import TokenMixer
from treadle.layers.token_shift import GATE_FEATURES
from treadle.ops.attention import cached_attention, causal_attention, scores_computed
from treadle.ops.sliding_window_attention import sliding_window_flops


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H E] -> [B, H, T, E]."""
    rows, length, width = x.shape
    return x.view(rows, length, heads, width // heads).transpose(1, 2)


class Attention(TokenMixer):
    """softmax(q k^T / sqrt(E)) v (Vaswani et al. 2017), keys and values shared by groups of heads (arXiv 2305.13245).

    whole_norm: qk_norm over all heads together instead of each; sliding_window w: position t sees t - w + 1 .. t; softcap c:
    scores s become c tanh(s / c); scale: scores are multiplied by it instead of 1 / sqrt(E). value_vocab: each of so many
    tokens has a vector of its own, added to its values through a gate of each head that reads the first features of x
    (modded-nanogpt's value embeddings, after the value residual of Zhou et al. 2024, arXiv 2410.17897).
    """

    def __init__(
        self, width: int, heads: int, groups: int, head_width: int, *, bias: bool = False, out_bias: bool = False,
        qk_norm: bool = False, whole_norm: bool = False, eps: float = 1e-6, dropout: float = 0.0,
        sliding_window: int | None = None, softcap: float | None = None, scale: float | None = None,
        linear: type[nn.Linear] = nn.Linear, value_vocab: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sliding_window, self.softcap, self.whole_norm = sliding_window, softcap, whole_norm
        self.query_factor = None if scale is None else scale * head_width**0.5  # what the kernels' own scale leaves to do
        self.heads, self.groups, self.head_width, self.dropout = heads, groups, head_width, dropout
        self.query = linear(width, heads * head_width, bias=bias)
        self.key = linear(width, groups * head_width, bias=bias)
        self.value = linear(width, groups * head_width, bias=bias)
        self.out = linear(heads * head_width, width, bias=out_bias)
        self.query_norm = RMSNorm(head_width * (heads if whole_norm else 1), eps) if qk_norm else None
        self.key_norm = RMSNorm(head_width * (groups if whole_norm else 1), eps) if qk_norm else None
        self.value_embedding = nn.Embedding(value_vocab, groups * head_width) if value_vocab else None
        self.value_gate = nn.Linear(min(GATE_FEATURES, width), groups, bias=False) if value_vocab else None

    @classmethod
    def from_config(cls, config: Any, layer: int) -> Attention:
        biases = config.attention_biases
        scalar = config.query_pre_attn_scalar
        return cls(
            config.hidden_size, config.num_heads, config.groups, config.width_of_head, bias=biases[0], out_bias=biases[1],
            qk_norm=config.qk_norm, whole_norm=config.qk_norm_over == "projection", eps=config.norm_eps,
            dropout=config.attention_dropout, sliding_window=cls.window_of(config), softcap=config.attn_logit_softcapping,
            scale=None if scalar is None else scalar**-0.5,
            value_vocab=config.vocab_size if config.has_value_embedding(layer) else None,
        )  # fmt: skip

    @classmethod
    def window_of(cls, config: Any) -> int | None:
        """Positions that a query of this layer sees; None: all before it."""
        return None

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LayerState:
        if self.sliding_window is not None:
            ring = min(self.sliding_window, max_len)
            return SlidingWindowCache(**SlidingWindowCache.fields(rows, self.groups, ring, self.head_width, device, dtype))
        return KeyValueCache.empty(rows, self.groups, max_len, self.head_width, device, dtype)

    def flops(self, length: int) -> int:
        projections = sum(layer.in_features * layer.out_features for layer in self.children() if isinstance(layer, nn.Linear))
        if self.sliding_window is not None and self.sliding_window < length and self.softcap is not None:
            return 2 * length * projections + sliding_window_flops(length, self.heads, self.head_width, self.sliding_window)
        scores = 2 * self.heads * self.head_width * scores_computed(length, self.sliding_window)  # q k^T and p v
        return 2 * (length * projections + scores)

    @classmethod
    def initial(cls, name: str, parameter: Tensor) -> float | str | Tensor | None:
        return "zeros" if name == "value_gate.weight" else None  # the gates start at 1

    @classmethod
    def elementwise(cls, name: str) -> bool:
        return name in ("value_embedding.weight", "value_gate.weight")

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return split_heads(x, heads)

    def _values(self, v: Tensor, x: Tensor, context: Context) -> Tensor:
        """The projected values as [B, G, T, E], with what the values' embedding adds."""
        v = self._split(v, self.groups)
        if self.value_embedding is None or self.value_gate is None:
            return v
        gate = 2 * self.value_gate(x[..., : self.value_gate.in_features]).sigmoid()  # [B, T, G]
        own = self._split(self.value_embedding(context.input_ids), self.groups)
        return v + gate.transpose(1, 2)[..., None] * own.to(v.dtype)

    def _queries_keys_values(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, E] and k [B, G, T, E], normalised, turned and scaled, and v [B, G, T, E]."""
        q, k, v = outputs(x, self.query, self.key, self.value)
        if self.whole_norm and self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = self._split(q, self.heads), self._split(k, self.groups)
        if not self.whole_norm and self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        rotary = context.rotary if self.sliding_window is None else context.local_rotary or context.rotary
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q if self.query_factor is None else q * self.query_factor, k, self._values(v, x, context)

    def forward(self, x: Tensor, context: Context, cache: Any = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a cache, x continues the tokens it holds."""
        rows, length, _ = x.shape
        q, k, v = self._queries_keys_values(x, context)
        softcap, positions = self.softcap, context.token_positions
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = causal_attention(q, k, v, doc_ids=context.doc_ids, segments=context.segments, dropout=dropout,
                                 window=self.sliding_window, softcap=softcap, ends=context.document_ends)  # fmt: skip
        elif self.sliding_window is not None:
            assert positions is not None
            y = cache.attend(q, k, v, positions, cache.keys.shape[2] - 1, softcap)
        else:
            assert positions is not None
            keys, values = cache.append(k, v, positions, context.used)
            y = cached_attention(q, keys.to(q.dtype), values.to(q.dtype), positions.position_ids, softcap)
        y = y.transpose(1, 2).reshape(rows, length, self.heads * self.head_width)
        return outputs(y, self.out)[0]


class SlidingAttention(Attention):
    """Attention over the last `sliding_window` positions of a document: time and memory grow with T, the cache does not.
    Beltagy et al. 2020, arXiv 2004.05150."""

    @classmethod
    def window_of(cls, config: Any) -> int | None:
        return int(config.sliding_window)
