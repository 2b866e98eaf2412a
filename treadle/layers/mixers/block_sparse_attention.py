"""Softmax attention over the blocks nearby and the first positions of a document, with a cache as long as those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from treadle.layers.context import Context
from treadle.layers.norm import RMSNorm
from treadle.layers.rope import rotate
from treadle.layers.state import LayerState, expanded
from treadle.layers.token_mixers import TokenMixer
from treadle.ops.block_sparse_attention import block_sparse_attention, block_sparse_flops, first_seen


@dataclass
class BlockSparseCache(LayerState):
    """The first G keys and values [B, groups, G + 1, E]; the last W = (previous + 1) x size in a ring [B, groups, W + 1, E]; the last
    slot of each takes padding and stays zero. count [B], tokens seen."""

    first_keys: Tensor
    first_values: Tensor
    keys: Tensor
    values: Tensor
    count: Tensor


class BlockSparseAttention(TokenMixer):
    """softmax(q k^T / sqrt(E)) v over what ops/block_sparse_attention.py lets a position see; projections as in Attention.
    Zaheer et al. 2020, arXiv 2007.14062."""

    def __init__(
        self, width: int, heads: int, groups: int, head_width: int, *, size: int, previous: int, global_tokens: int,
        bias: bool = False, qk_norm: bool = False, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.groups, self.head_width = heads, groups, head_width
        self.size, self.previous, self.global_tokens = size, previous, global_tokens
        self.query = nn.Linear(width, heads * head_width, bias=bias)
        self.key = nn.Linear(width, groups * head_width, bias=bias)
        self.value = nn.Linear(width, groups * head_width, bias=bias)
        self.out = nn.Linear(heads * head_width, width, bias=bias)
        self.query_norm = RMSNorm(head_width, eps) if qk_norm else None
        self.key_norm = RMSNorm(head_width, eps) if qk_norm else None

    @classmethod
    def from_config(cls, config: Any, layer: int) -> BlockSparseAttention:
        return cls(
            config.hidden_size, config.num_heads, config.groups, config.width_of_head, size=config.attention_block_size,
            previous=config.previous_blocks, global_tokens=config.global_tokens, bias=config.style == "gpt2",
            qk_norm=config.qk_norm, eps=config.norm_eps,
        )  # fmt: skip

    @property
    def window(self) -> int:
        """Positions that decoding keeps behind the first ones: the own block and the `previous` ones."""
        return (self.previous + 1) * self.size

    def new_state(self, rows: int, max_len: int, device: Any, dtype: Any) -> LayerState:
        def empty(slots: int) -> Tensor:
            return torch.zeros(rows, self.groups, slots + 1, self.head_width, device=device, dtype=dtype)

        first, ring = self.global_tokens, self.window
        return BlockSparseCache(empty(first), empty(first), empty(ring), empty(ring), torch.zeros(rows, dtype=torch.int64, device=device))

    def flops(self, length: int) -> int:
        projections = self.query.in_features * self.head_width * (2 * self.heads + 2 * self.groups)
        shape = (self.heads, self.head_width, self.size, self.previous, self.global_tokens)
        return 2 * length * projections + block_sparse_flops(length, *shape)

    def forward(self, x: Tensor, context: Context, state: BlockSparseCache | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with a state, x continues the tokens it holds."""
        rows, length, _ = x.shape
        q = self.query(x).view(rows, length, self.heads, -1).transpose(1, 2)
        k, v = (layer(x).view(rows, length, self.groups, -1).transpose(1, 2) for layer in (self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if context.rotary is not None:
            q, k = rotate(q, *context.rotary), rotate(k, *context.rotary)
        if state is None:
            repeat = self.heads // self.groups
            k, v = expanded(k, repeat), expanded(v, repeat)
            y = block_sparse_attention(q, k, v, self.size, self.previous, self.global_tokens, context.doc_ids)
        else:
            y = self._decode(q, k, v, context, state)
        return self.out(y.transpose(1, 2).reshape(rows, length, -1))

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, context: Context, state: BlockSparseCache) -> Tensor:
        """In pieces of one window, so that a long prompt makes no T x T matrix."""
        assert context.token_positions is not None
        mask, positions = context.token_positions.token_mask, context.token_positions.position_ids
        parts = []
        for start in range(0, q.shape[2], self.window):
            at = slice(start, start + self.window)
            parts.append(self._piece(q[:, :, at], k[:, :, at], v[:, :, at], mask[:, at], positions[:, at], state))
        return torch.cat(parts, 2)

    def _piece(self, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor, positions: Tensor, state: BlockSparseCache) -> Tensor:
        """Softmax over the first keys, the ring and the new keys; each position is held by one of them. Then they are kept."""
        w, g, count = self.window, self.global_tokens, state.count[:, None]
        slots = torch.arange(w, device=q.device)
        ring = count - 1 - (count - 1 - slots) % w  # [B, W]: the position that a slot holds, negative where it is empty
        new = torch.where(token_mask, positions, -1)
        first = torch.arange(g, device=q.device)
        now = positions[..., None]
        lowest = first_seen(now, self.size, self.previous)
        seen_ring = (ring >= 0)[:, None] & (ring[:, None] >= lowest)
        seen_new = (new >= 0)[:, None] & (new[:, None] <= now) & ((new[:, None] >= lowest) | (new < g)[:, None])
        seen_first = (first < count)[:, None] & (first < lowest)
        seen = torch.cat([seen_first, seen_ring, seen_new], -1)[:, None]
        repeat = self.heads // self.groups
        held = ((state.first_keys, state.keys, k), (state.first_values, state.values, v))
        keys, values = (
            expanded(torch.cat([a[:, :, :g].to(t.dtype), b[:, :, :w].to(t.dtype), t], 2), repeat) for a, b, t in held
        )
        scores = (q * self.head_width**-0.5) @ keys.transpose(-1, -2)
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        y = weights.to(values.dtype) @ values
        state.count = state.count + token_mask.sum(1)
        latest, among_first = token_mask & (positions >= (state.count - w)[:, None]), token_mask & (positions < g)
        self._store((state.keys, state.values), (k, v), latest, torch.where(latest, positions % w, w))
        self._store((state.first_keys, state.first_values), (k, v), among_first, torch.where(among_first, positions, g))
        return y

    @staticmethod
    def _store(kept: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], where: Tensor, place: Tensor) -> None:
        rows = torch.arange(place.shape[0], device=place.device)[:, None]
        for cache, t in zip(kept, new):
            cache.transpose(1, 2)[rows, place] = (t.detach().transpose(1, 2) * where[:, :, None, None]).to(cache.dtype)
