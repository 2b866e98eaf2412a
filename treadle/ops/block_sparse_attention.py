"""Causal attention over blocks of a document and its first positions (BigBird's window and global tokens, Zaheer et al. 2020,
arXiv 2007.14062, in causal form; the first positions as in attention sinks, arXiv 2309.17453).

Position t of a document sees, up to itself, the block of `size` positions it is in, `previous` whole blocks before that, and the
document's first `global_tokens` positions. Blocks are counted from the beginning of each document, so that a packed document
gets what it gets alone. Computed in slices of the row: time and memory grow with T, not T^2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.documents import document_positions


def block_sparse_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, size: int, previous: int, global_tokens: int, doc_ids: Tensor | None = None
) -> Tensor:
    """The same with the dense mask; q, k, v [B, H, T, E]."""
    length = q.shape[2]
    row = torch.arange(length, device=q.device)
    positions = row[None] if doc_ids is None else document_positions(doc_ids)
    seen = row[:, None] >= row
    seen = seen & ((positions[:, None, :] >= first_seen(positions, size, previous)[..., None]) | (positions < global_tokens)[:, None, :])
    if doc_ids is not None:
        seen = seen & (doc_ids[:, :, None] == doc_ids[:, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None])


def first_seen(positions: Tensor, size: int, previous: int) -> Tensor:
    """The first position of the blocks that each position sees (may be negative). positions [..., T] -> [..., T]."""
    return (positions.div(size, rounding_mode="floor") - previous) * size


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, size: int, previous: int, global_tokens: int, doc_ids: Tensor | None = None
) -> Tensor:
    """q, k, v [B, H, T, E] -> [B, H, T, E].

    A slice of `size` positions meets its own keys, those of the previous + 1 slices before it (blocks of a document that
    begins anywhere lie across two slices), and the first keys of the one document that reaches into it from further back.
    """
    rows, heads, length, width = q.shape
    spare, back = -length % size, (previous + 1) * size
    row = torch.arange(length, device=q.device)
    if doc_ids is None:
        doc_ids = torch.zeros(1, length, dtype=torch.int64, device=q.device)
    own = F.pad(doc_ids, (0, spare), value=-1)
    positions = document_positions(own)
    own, at = own.unflatten(1, (-1, size)), positions.unflatten(1, (-1, size))  # [B or 1, C, S]
    row = torch.arange(length + spare, device=q.device).view(-1, size)
    q = F.pad(q * width**-0.5, (0, 0, 0, spare)).unflatten(2, (-1, size))  # [B, H, C, S, E]; scaled first, for fp16's range
    near_k, near_v = (F.pad(t, (0, 0, back, spare)).unfold(2, size + back, size).transpose(-1, -2) for t in (k, v))
    place = F.pad(row.flatten(), (back, 0), value=-1).unfold(0, size + back, size)  # [C, S + W], a key's place in the row
    theirs = F.pad(own.flatten(1), (back, 0), value=-2).unfold(1, size + back, size)
    their_at = F.pad(positions, (back, 0), value=-1).unfold(1, size + back, size)
    lowest = first_seen(at, size, previous)[..., None]
    seen = (place[:, None, :] >= 0) & (place[:, None, :] <= row[:, :, None])
    seen = seen & (own[..., None] == theirs[..., None, :])
    seen = seen & ((their_at[..., None, :] >= lowest) | (their_at < global_tokens)[..., None, :])
    scores = q @ near_k.transpose(-1, -2)
    if global_tokens:
        begins = row[:, 0] - at[..., 0]  # [B or 1, C], where the document at each slice's beginning begins
        far = begins[..., None] + torch.arange(global_tokens, device=q.device)  # [B or 1, C, G]
        index = far.clamp_max(length - 1).flatten(1)[:, None, :, None].expand(rows, heads, -1, width)
        far_k, far_v = (t.gather(2, index).unflatten(2, (-1, global_tokens)) for t in (k, v))
        further = (far < (row[:, 0] - back)[:, None])[..., None, :] & (own == own[..., :1])[..., None]
        seen = torch.cat([further, seen], -1)
        scores = torch.cat([q @ far_k.transpose(-1, -2), scores], -1)
        near_v = torch.cat([far_v, near_v], 3)
    scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ near_v).flatten(2, 3)[:, :, :length]


def block_sparse_flops(length: int, heads: int, width: int, size: int, previous: int, global_tokens: int) -> int:
    """Floating-point operations of the products of one row."""
    padded = -(-length // size) * size
    return 2 * 2 * heads * padded * ((previous + 2) * size + global_tokens) * width
