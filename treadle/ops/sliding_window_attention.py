"""Causal attention over the last `window` positions of a document, in blocks: time and memory grow with T, not T^2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # at least; measured at T = 512, window 16: 16 takes 1.3 times as long


def sliding_window_attention_reference(q: Tensor, k: Tensor, v: Tensor, window: int, doc_ids: Tensor | None = None) -> Tensor:
    """The same with the dense mask; q, k, v [B, H, T, E]."""
    positions = torch.arange(q.shape[2], device=q.device)
    gap = positions[:, None] - positions[None]
    mask = ((gap >= 0) & (gap < window))[None, None]
    if doc_ids is not None:
        mask = mask & (doc_ids[:, :, None] == doc_ids[:, None, :])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def block_size(window: int) -> int:
    """Positions of a query block for this window: no smaller, so that a block and the one before it hold all it sees."""
    return max(window, BLOCK)


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, doc_ids: Tensor | None = None, softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """q, k, v [B, H, T, E] -> [B, H, T, E]: position t sees t - window + 1 .. t of its own document. softcap c: the scores s
    become c tanh(s / c); dropout: the share of weights dropped."""
    length, width = q.shape[2:]
    size = block_size(window)
    spare = -length % size
    q = F.pad(q, (0, 0, 0, spare)).unflatten(2, (-1, size))  # [B, H, C, S, E]
    k, v = (F.pad(t, (0, 0, window, spare)).unfold(2, size + window, size) for t in (k, v))  # [B, H, C, E, S + W]
    scores = (q @ k) * width**-0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    positions = torch.arange(length + spare, device=q.device).view(-1, size)
    keys = F.pad(torch.arange(length + spare, device=q.device), (window, 0), value=-1).unfold(0, size + window, size)
    gap = positions[:, :, None] - keys[:, None, :]
    seen = ((gap >= 0) & (gap < window) & (keys >= 0)[:, None, :])[None, None]
    if doc_ids is not None:
        own = F.pad(doc_ids, (0, spare), value=-1).unflatten(1, (-1, size))
        theirs = F.pad(doc_ids, (window, spare), value=-1).unfold(1, size + window, size)
        seen = seen & (own[..., :, None] == theirs[..., None, :])[:, None]
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return (weights @ v.transpose(-1, -2)).flatten(2, 3)[:, :, :length]


def sliding_window_flops(length: int, heads: int, width: int, window: int) -> int:
    """Floating-point operations of the products of one row."""
    size = block_size(window)
    padded = -(-length // size) * size
    return 2 * 2 * heads * padded * (size + window) * width
