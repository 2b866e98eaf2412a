"""Attention that looks both ways: over a row's own document (encoders), and over another sequence (cross-attention)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from treadle.layers.attention import Attention, split_heads
from treadle.layers.context import Context
from treadle.ops.attention import bidirectional_attention


class BidirectionalAttention(Attention):
    """Every position sees its whole document, what follows it too (Devlin et al. 2019, arXiv 1810.04805); no decoding."""

    def forward(self, x: Tensor, context: Context, cache: Any = None) -> Tensor:
        """x [B, T, D] -> [B, T, D], every position from its whole document."""
        rows, length, _ = x.shape
        q, k, v = self._queries_keys_values(x, context)
        documents = context.doc_ids
        mask = None if documents is None else documents[:, :, None] == documents[:, None]
        y = bidirectional_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(rows, length, self.heads * self.head_width))


class CrossAttention(nn.Module):
    """Queries of one sequence over keys and values of another (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3)."""

    def __init__(self, width: int, heads: int, groups: int, head_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.groups, self.head_width, self.dropout = heads, groups, head_width, dropout
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key = nn.Linear(width, groups * head_width, bias=False)
        self.value = nn.Linear(width, groups * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source [B, S, D] -> keys, values [B, G, S, E]."""
        return split_heads(self.key(source), self.groups), split_heads(self.value(source), self.groups)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, D] over keys, values [B, G, S, E]; mask bool [B, S], true on real ones."""
        rows, length, _ = x.shape
        q = split_heads(self.query(x), self.heads)
        y = bidirectional_attention(q, keys.to(q.dtype), values.to(q.dtype), mask, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(rows, length, self.heads * self.head_width))

    def flops(self, length: int, source: int) -> int:
        """Operations of a forward pass over `length` positions that read `source` others."""
        of_source = source * (self.key.weight.numel() + self.value.weight.numel())
        return 2 * (length * (self.query.weight.numel() + self.out.weight.numel()) + of_source + 2 * self.heads * self.head_width * length * source)
