"""Causal attention over packed documents: a dense reference and the fast paths, with one dispatch.

All take q [B, H, T, E], k and v [B, G, T, E] (G divides H: grouped queries) and return [B, H, T, E]. A query sees the
positions of its own document up to its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 128  # measured on CPU at T = 256 and 512: 64 and 256 are 3-10% slower

# Memory is planned here for a GPU: its kernel keeps no probabilities, and neither does torch's for whole rows on a CPU.
_GPU_PLANNED: ContextVar[bool] = ContextVar("gpu_planned", default=False)


@contextmanager
def planned_for_gpu() -> Iterator[None]:
    """Inside, attention of tensors on the CPU takes the way that it takes on a GPU."""
    token = _GPU_PLANNED.set(True)
    try:
        yield
    finally:
        _GPU_PLANNED.reset(token)


Segments = tuple[tuple[int, ...], ...]


def document_mask(doc_ids: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Boolean [B or 1, 1, T, T], true where a query (row) may see a key (column). Padding sees itself, so no row is empty."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if doc_ids is None:
        return causal[None, None]
    return (causal & (doc_ids[:, :, None] == doc_ids[:, None, :]))[:, None]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Masked dense attention: softmax(q k^T / sqrt(E)) v over the visible positions."""
    k, v = _expand_groups(q, k, v)
    mask = document_mask(doc_ids, q.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _expand_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    repeat = q.shape[1] // k.shape[1]
    if repeat == 1:
        return k, v
    return k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)


# (first, last, start, stop): heads [first, last) of the flattened rows, positions [start, stop): one document of some rows.
Span = tuple[int, int, int, int]


class _BlockCausal(torch.autograd.Function):
    """Causal attention inside each span, in blocks of queries, skipping the keys after each block; q, k, v [N, T, E].

    On CPU, forward and backward, this takes .3 (bf16) to .6 (fp32) of the CPU time of scaled_dot_product_attention at
    T = 512, at the price of saving the probabilities: about N T (T + 128) / 2 numbers for whole rows.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...]) -> Tensor:  # type: ignore[override]
        scale = q.shape[2] ** -0.5
        out = torch.zeros_like(q)  # padding belongs to no span
        kept, masks = [], {}
        for first, last, begin, end in spans:
            for start in range(begin, end, QUERY_BLOCK):
                stop = min(start + QUERY_BLOCK, end)
                shape = (stop - start, stop - begin)
                if shape not in masks:
                    masks[shape] = q.new_full((1, *shape), float("-inf")).triu_(start - begin + 1)
                keys = k[first:last, begin:stop].transpose(1, 2)
                share = torch.softmax(torch.baddbmm(masks[shape], q[first:last, start:stop], keys, alpha=scale), -1)
                out[first:last, start:stop] = torch.bmm(share, v[first:last, begin:stop])
                kept.append(share)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        q, k, v, *kept = ctx.saved_tensors
        scale, shares = q.shape[2] ** -0.5, iter(kept)
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for first, last, begin, end in ctx.spans:
            for start in range(begin, end, QUERY_BLOCK):
                stop, share = min(start + QUERY_BLOCK, end), next(shares)
                rows, part = slice(first, last), grad[first:last, start:stop]
                grad_v[rows, begin:stop].baddbmm_(share.transpose(1, 2), part)
                slope = torch.bmm(part, v[rows, begin:stop].transpose(1, 2))
                slope = torch._softmax_backward_data(slope, share, -1, share.dtype)
                grad_q[rows, start:stop] = torch.bmm(slope, k[rows, begin:stop]).mul_(scale)
                grad_k[rows, begin:stop].baddbmm_(slope.transpose(1, 2), q[rows, start:stop], alpha=scale)
        return grad_q, grad_k, grad_v, None


def spans_of(segments: Segments, heads: int) -> tuple[Span, ...]:
    """The documents of all rows as spans; neighbouring rows of equal layout share theirs, so whole rows are one span."""
    spans: list[Span] = []
    row = 0
    while row < len(segments):
        until = row + 1
        while until < len(segments) and segments[until] == segments[row]:
            until += 1
        at = 0
        for run in segments[row]:
            if run > 0:
                spans.append((row * heads, until * heads, at, at + run))
            at += abs(run)
        row = until
    return tuple(spans)


def block_causal(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention inside each document, by query blocks; padding comes out as zero."""
    rows, heads, length, width = q.shape
    k, v = _expand_groups(q, k, v)
    flat = [x.reshape(rows * heads, length, width) for x in (q, k, v)]
    return _BlockCausal.apply(*flat, spans_of(segments, heads)).view(rows, heads, length, width)  # type: ignore[no-untyped-call]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    doc_ids: Tensor | None = None,
    segments: Segments | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The fastest exact path for what is known on the host: whole rows, documents by segments, else the dense mask."""
    whole = all(len(row) == 1 and row[0] > 0 for row in segments) if segments is not None else doc_ids is None
    if dropout > 0 or (segments is None and not whole):
        return attention_reference(q, k, v, None if whole else doc_ids, dropout)
    if q.device.type != "cpu" or torch.compiler.is_compiling() or _GPU_PLANNED.get():
        if whole:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return attention_reference(q, k, v, doc_ids)
    return block_causal(q, k, v, segments if segments is not None else ((q.shape[2],),) * q.shape[0])


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """q [B, H, T, E] at positions [B, T] over a cache k, v [B, G, S, E]: key s is seen by positions >= s."""
    mask = positions[:, None, :, None] >= torch.arange(k.shape[2], device=q.device)
    k, v = _expand_groups(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
