"""Attention over the last `window` positions, with a ring buffer of keys and values instead of a growing cache."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treadle.layers.attention import Attention
from treadle.layers.context import Context
from treadle.layers.reproducible import ReproducibleLinear, to_reproducible
from treadle.layers.rope import rotate
from treadle.layers.state import LayerState, TokenPositions
from treadle.ops.precision import without_autocast
from treadle.ops.sliding_window_attention import sliding_window_attention, sliding_window_flops


@dataclass
class SlidingWindowCache(LayerState):
    """The last w rotated keys and values [B, G, w + 1, E], the last slot taking padding; count [B], tokens seen."""

    keys: Tensor
    values: Tensor
    count: Tensor

    @staticmethod
    def fields(rows: int, groups: int, window: int, width: int, device: Any, dtype: Any) -> dict[str, Tensor]:
        made = (torch.zeros(rows, groups, window + 1, width, device=device, dtype=dtype) for _ in range(2))
        return {**dict(zip(("keys", "values"), made)), "count": torch.zeros(rows, dtype=torch.int64, device=device)}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, token_positions: TokenPositions, window: int) -> Tensor:
        """Softmax over the ring and the new tokens, q [B, H, T, E], k and v [B, G, T, E]; then the ring takes the newest."""
        w, count = window, self.count[:, None]
        slots = torch.arange(w, device=q.device)
        old = count - 1 - (count - 1 - slots) % w  # [B, w]: the position that a slot holds, negative where it is empty
        new = torch.where(token_positions.token_mask, token_positions.position_ids, -1)
        held = torch.cat([old, new], 1)[:, None]  # [B, 1, w + T]
        now = token_positions.position_ids[:, :, None]
        seen = (held >= 0) & (held <= now) & (held > now - w)
        repeat = q.shape[1] // k.shape[1]
        keys, values = (
            expanded(torch.cat([ring[:, :, :w].to(t.dtype), t], 2), repeat) for ring, t in ((self.keys, k), (self.values, v))
        )
        scores = (q @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1)
        after = self.count + token_positions.token_mask.sum(1)
        stored = token_positions.token_mask & (token_positions.position_ids >= (after - w)[:, None])
        slots = torch.where(stored, token_positions.position_ids % w, w)
        rows = torch.arange(q.shape[0], device=q.device)[:, None]
        for ring, t in ((self.keys, k), (self.values, v)):
            new = t.detach().transpose(1, 2) * stored[:, :, None, None]
            ring.transpose(1, 2)[rows, slots] = new.to(ring.dtype)
        self.count = after
        return weights @ values


def expanded(t: Tensor, repeat: int) -> Tensor:
    """Groups [B, G, ...] repeated for their heads."""
    return t if repeat == 1 else t.repeat_interleave(repeat, dim=1)


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

    def forward(self, x: Tensor, context: Context, cache: SlidingWindowCache | None = None) -> Tensor:  # type: ignore[override]
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
