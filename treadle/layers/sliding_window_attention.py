"""Attention over the last `window` positions where a model rounds, and the form that hybrids share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from treadle.layers.attention import Attention
from treadle.layers.context import Context
from treadle.layers.reproducible import ReproducibleLinear, to_reproducible
from treadle.layers.rope import rotate
from treadle.layers.state import SlidingWindowCache, expanded
from treadle.ops.precision import without_autocast
from treadle.ops.sliding_window_attention import sliding_window_attention, sliding_window_flops


def attend(q: Tensor, k: Tensor, v: Tensor, context: Context, cache: SlidingWindowCache | None, window: int) -> Tensor:
    """Softmax over the last `window` positions, q [B, H, T, E], k and v [B, G, T, E]; with a ring, over what it holds too."""
    if cache is None:
        repeat = q.shape[1] // k.shape[1]
        return sliding_window_attention(q, expanded(k, repeat), expanded(v, repeat), window, context.doc_ids)
    assert context.token_positions is not None
    return cache.attend(q, k, v, context.token_positions, window)


class SlidingWindowAttention(Attention):
    """Softmax attention of position t over t - window + 1 .. t of its document, with rotary positions. `reproducible`:
    evaluation in fp64 (layers/reproducible.py), for models that round."""

    def __init__(self, width: int, heads: int, *, window: int, reproducible: bool = False) -> None:
        linear: type[nn.Linear] = ReproducibleLinear if reproducible else nn.Linear
        super().__init__(width, heads, heads, width // heads, linear=linear)
        self.window, self.reproducible = window, reproducible

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> SlidingWindowCache:
        dtype = torch.float64 if self.reproducible else dtype
        return SlidingWindowCache(**SlidingWindowCache.fields(rows, self.groups, self.window, self.head_width, device, dtype))

    def forward(self, x: Tensor, context: Context, cache: SlidingWindowCache | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a cache, x continues the tokens it holds."""
        rows, length, _ = x.shape
        q, k, v = (self._split(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        with without_autocast(x) if self.reproducible else nullcontext():
            if self.reproducible:
                q, k, v = to_reproducible(q), to_reproducible(k), to_reproducible(v)
            assert context.rotary is not None
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
            y = attend(q, k, v, context, cache, self.window)
        return self.out(y.to(x.dtype).transpose(1, 2).reshape(rows, length, -1))

    def flops(self, length: int) -> int:
        """Of the products of one row's forward pass."""
        width = self.query.in_features
        return 2 * length * 4 * width * width + sliding_window_flops(length, self.heads, self.head_width, self.window)
