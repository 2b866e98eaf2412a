"""Attention whose decoding cache keeps r numbers per token instead of keys and values (multi-head latent attention,
DeepSeek-V2, arXiv 2405.04434, without its separate rotary key)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from treadle.layers.attention import Attention
from treadle.layers.context import Context
from treadle.layers.rope import rotate, rotation
from treadle.layers.state import LayerState, TokenPositions
from treadle.ops.attention import cached_attention, causal_attention


@dataclass
class LatentCache(LayerState):
    """Latents [B, max_len + 1, r]; the slot behind the last takes padding."""

    slots_at: ClassVar[Mapping[str, int]] = MappingProxyType({"latents": 1})
    latents: Tensor

    @staticmethod
    def empty(rows: int, max_len: int, size: int, device: Any, dtype: Any) -> LatentCache:
        """Room for `max_len` latents of `size` numbers in each of `rows` rows."""
        return LatentCache(torch.zeros(rows, max_len + 1, size, device=device, dtype=dtype))

    def append(self, latents: Tensor, token_positions: TokenPositions, used: int) -> Tensor:
        """Writes latents [B, T, r] into their slots; returns all in use [B, used, r]."""
        rows = torch.arange(latents.shape[0], device=latents.device)[:, None]
        self.latents[rows, token_positions.cache_slots] = (latents.detach() * token_positions.token_mask[:, :, None]).to(self.latents.dtype)
        return self.latents[:, :used]


class LatentAttention(Attention):
    """c = down(x) [r]; keys = rope(key(c)), values = value(c). Decoding computes the keys and values of the whole past
    anew at each step: r/2E of the memory, for more time."""

    def __init__(self, width: int, heads: int, groups: int, head_width: int, size: int, theta: float) -> None:
        super().__init__(width, heads, groups, head_width)
        self.theta = theta
        self.down = nn.Linear(width, size, bias=False)
        self.key = nn.Linear(size, groups * head_width, bias=False)
        self.value = nn.Linear(size, groups * head_width, bias=False)

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LatentCache:
        return LatentCache.empty(rows, max_len, self.down.out_features, device, dtype)

    def forward(self, x: Tensor, context: Context, cache: LatentCache | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a cache, x continues the tokens it holds."""
        rows, length, _ = x.shape
        assert context.rotary is not None
        q, latents = rotate(self._split(self.query(x), self.heads), *context.rotary), self.down(x)
        if cache is None:
            k = rotate(self._split(self.key(latents), self.groups), *context.rotary)
            v = self._split(self.value(latents), self.groups)
            y = causal_attention(q, k, v, doc_ids=context.doc_ids, segments=context.segments, ends=context.document_ends)
        else:
            assert context.token_positions is not None
            past = cache.append(latents, context.token_positions, context.used).to(latents.dtype)
            positions = torch.arange(past.shape[1], device=x.device)[None].expand(rows, -1)
            k = rotate(self._split(self.key(past), self.groups), *rotation(positions, self.head_width, self.theta))
            v = self._split(self.value(past), self.groups)
            y = cached_attention(q, k, v, context.token_positions.position_ids)
        return self.out(y.transpose(1, 2).reshape(rows, length, self.heads * self.head_width))
