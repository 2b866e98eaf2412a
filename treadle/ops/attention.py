"""Causal attention over packed documents: a dense reference and the fast paths, with one dispatch.

All take q [B, H, T, E], k and v [B, G, T, E] (G divides H: grouped queries) and return [B, H, T, E]. A query sees the
positions of its own document up to its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry, register_flop_formula

from treadle.errors import ConfigError
from treadle.ops.document_attention import document_attention, takes
from treadle.ops.documents import Segments
from treadle.ops.first_order import first_order
from treadle.ops.fused import KINDS, kernels, threads_for
from treadle.ops.kernel_inputs import address
from treadle.ops.planned import gpu_is_planned
from treadle.ops.sliding_window_attention import sliding_window_attention

QUERY_BLOCK = 128  # measured on CPU at T = 256 and 512: 64 and 256 are 3-10% slower

# Tokens of a document from which on torch's own kernel for CPUs is taken, which keeps no probabilities. Measured on an Intel Xeon with AVX-512,
# one core, 6 heads of 64, forward and backward: its time over that of the blocks is 1.1 at 2048 tokens and .7 at 4096 in fp32; 1.2 at
# both in bf16, where memory decides (6 heads x 8192^2 / 2 probabilities are .4 GB a block and row).
LONG = {torch.float32: 4096, torch.bfloat16: 8192}

# torch's kernels by the names that users know; auto leaves the choice to `causal_attention` and to torch.
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "math": SDPBackend.MATH}  # fmt: skip
_backend = "auto"  # of this process, as torch's own switches are


# torch's counter does not know its kernel for CPUs.
for _kernel, _alike in ((torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.aten._scaled_dot_product_flash_attention),
                        (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
                         torch.ops.aten._scaled_dot_product_flash_attention_backward)):  # fmt: skip
    if _kernel not in flop_registry:
        register_flop_formula(_kernel, get_raw=True)(flop_registry[_alike])


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Full attention inside runs in this kernel of torch's (auto, or a name of BACKENDS); ConfigError where there is none for
    what is asked of it. Sliding windows and soft-caps have one way of their own."""
    global _backend
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def check_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What attention is computed by, for people; ConfigError when this device has no such kernel."""
    if name == "auto":
        return "auto (blocks of queries; torch's for long documents)" if device.type == "cpu" else "auto (torch chooses)"
    probe = torch.zeros(1, 1, 8, 16, device=device, dtype=dtype)
    with attention_backend(name), torch.no_grad():
        _sdpa(probe, probe, probe, is_causal=True)
    return name


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    if _backend == "auto":
        return F.scaled_dot_product_attention(q, k, v, **how)
    try:
        with sdpa_kernel(BACKENDS[_backend]):
            return F.scaled_dot_product_attention(q, k, v, **how)
    except RuntimeError as problem:
        if "kernel" not in str(problem):
            raise
        masked = " with a mask (rows of several documents)" if how.get("attn_mask") is not None else ""
        raise ConfigError(f"attention_backend = {_backend}: torch has no such kernel for {q.dtype} on {q.device.type}{masked}; use auto "
                          "or math") from None  # fmt: skip


def document_mask(doc_ids: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Boolean [B or 1, 1, T, T], true where a query (row) may see a key (column). Padding sees itself, so no row is empty."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if doc_ids is None:
        return causal[None, None]
    return (causal & (doc_ids[:, :, None] == doc_ids[:, None, :]))[:, None]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, doc_ids: Tensor | None = None, dropout: float = 0.0, softcap: float | None = None
) -> Tensor:
    """Masked dense attention: softmax(q k^T / sqrt(E)) v over the visible positions. q [B, H, T, E], k, v [B, G, T, E],
    doc_ids [B, T] -> [B, H, T, E]."""
    return _masked(q, k, v, document_mask(doc_ids, q.shape[2], q.device), dropout, softcap)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float = 0.0, softcap: float | None = None) -> Tensor:
    """softcap c: the scores s become c tanh(s / c) before the softmax (Gemma 2, arXiv 2408.00118)."""
    k, v = _expand_groups(q, k, v)
    if softcap is None:
        return _sdpa(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = softcap * ((q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 / softcap)).tanh()
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return F.dropout(weights, dropout, dropout > 0) @ v


def _expand_groups(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    repeat = q.shape[1] // k.shape[1]
    if repeat == 1:
        return k, v
    return k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)


# (first, last, start, stop): heads [first, last) of the flattened rows, positions [start, stop): one document of some rows.
Span = tuple[int, int, int, int]


class _BlockCausal(torch.autograd.Function):
    """Causal attention inside each span, in blocks of queries, skipping the keys after each block, and before the window of
    its first query where there is one; q, k, v [N, T, E].

    On CPU, forward and backward, this takes .3 (bf16) to .6 (fp32) of the CPU time of scaled_dot_product_attention at
    T = 512, at the price of saving the probabilities: about N T (T + 128) / 2 numbers for whole rows, N T (window + 128)
    with a window.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: tuple[Span, ...], window: int | None, heads: int
    ) -> Tensor:
        _, length, width = q.shape
        # [B, T, H, E] in memory, as the projection that follows reads it; padding belongs to no span.
        out = q.new_zeros(q.shape[0] // heads, length, heads, width)
        kept = []
        for first, last, begin, end in spans:
            rows = out[first // heads : last // heads].transpose(1, 2)
            for start in range(begin, end, QUERY_BLOCK):
                stop, low = min(start + QUERY_BLOCK, end), _first_key(begin, start, window)
                share = _shares(q[first:last, start:stop], k[first:last, low:stop], start - low, window)
                rows[:, :, start:stop] = torch.bmm(share, v[first:last, low:stop]).unflatten(0, (-1, heads))
                kept.append(share)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.spans, ctx.window = spans, window
        return out.transpose(1, 2)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        shares = iter(kept)
        grad = grad.reshape(q.shape)
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for first, last, begin, end in ctx.spans:
            for start in range(begin, end, QUERY_BLOCK):
                stop, share = min(start + QUERY_BLOCK, end), next(shares)
                rows, part, low = slice(first, last), grad[first:last, start:stop], _first_key(begin, start, ctx.window)
                grad_v[rows, low:stop].baddbmm_(share.transpose(1, 2), part)
                slope = _slopes(torch.bmm(part, v[rows, low:stop].transpose(1, 2)), share, q.shape[2] ** -0.5, start - low, ctx.window)
                grad_q[rows, start:stop] = torch.bmm(slope, k[rows, low:stop])
                grad_k[rows, low:stop].baddbmm_(slope.transpose(1, 2), q[rows, start:stop])
        return grad_q, grad_k, grad_v, None, None, None


def _shares(q: Tensor, k: Tensor, offset: int, window: int | None) -> Tensor:
    """q [N, Q, E], k [N, K, E] -> softmax of their scaled products [N, Q, K]; query i stands at key offset + i, and sees that
    one and those before it, `window` at most."""
    scale, keys = q.shape[2] ** -0.5, k.transpose(1, 2)
    native = kernels(q, k)
    if native is not None:
        share = torch.bmm(q, keys)
        native.causal_softmax(address(share), KINDS[share.dtype], scale, *share.shape, offset, window or 0, threads_for(share.numel()))
        return share
    mask = q.new_full((1, q.shape[1], k.shape[1]), float("-inf")).triu_(offset + 1)
    if window is not None:
        mask += torch.full_like(mask, float("-inf")).tril_(offset - window)
    return torch.softmax(torch.baddbmm(mask, q, keys, alpha=scale), -1)


def _slopes(grad: Tensor, share: Tensor, scale: float, offset: int, window: int | None) -> Tensor:
    """The gradient of the shares [N, Q, K] -> that of the products before they were scaled; `grad` may be overwritten."""
    native = kernels(grad, share)
    if native is None:
        return torch._softmax_backward_data(grad, share, -1, share.dtype).mul_(scale)
    native.causal_softmax_backward(
        address(grad), address(share), KINDS[grad.dtype], scale, *grad.shape, offset, window or 0, threads_for(grad.numel())
    )
    return grad


def _first_key(begin: int, start: int, window: int | None) -> int:
    """The first key that a block of queries from `start` on may see."""
    return begin if window is None else max(begin, start - window + 1)


def scores_computed(length: int, window: int | None) -> int:
    """Query-key pairs of one head over one row; without a window all are counted, as is customary."""
    if window is None or window >= length:
        return length * length
    blocks = [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]
    return sum((stop - start) * (stop - _first_key(0, start, window)) for start, stop in blocks)


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


def block_causal(q: Tensor, k: Tensor, v: Tensor, segments: Segments, window: int | None = None) -> Tensor:
    """Causal attention inside each document (over its last `window` positions), by query blocks; padding comes out as zero. Long documents
    without a window go through torch's kernel. q [B, H, T, E], k, v [B, G, T, E] -> [B, H, T, E]."""
    rows, heads, length, width = q.shape
    k, v = _expand_groups(q, k, v)
    spans = spans_of(segments, heads)
    long = [span for span in spans if window is None and _is_long(span, q.dtype)]
    if long and spans == ((0, rows * heads, 0, length),):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    flat = [x.reshape(rows * heads, length, width) for x in (q, k, v)]
    # All others together: each slice below has a gradient of the whole's size.
    out: Tensor = _BlockCausal.apply(*flat, tuple(span for span in spans if span not in long), window, heads)  # type: ignore[no-untyped-call]
    if long:
        out = out.clone()
    for first, last, begin, end in long:
        rows_of, places = slice(first // heads, last // heads), slice(begin, end)
        one, two, three = (x[rows_of, :, places] for x in (q, k, v))
        out[rows_of, :, places] = F.scaled_dot_product_attention(one, two, three, is_causal=True)
    return out


def _is_long(span: Span, dtype: torch.dtype) -> bool:
    return span[3] - span[2] >= LONG.get(dtype, LONG[torch.float32])


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    doc_ids: Tensor | None = None,
    segments: Segments | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """The fastest exact path for what is known on the host: whole rows, documents by segments (on a GPU by `ends`,
    ops/document_attention.py), else the dense mask. window: position t sees t - window + 1 .. t; softcap c: the scores s become
    c tanh(s / c). q [B, H, T, E], k, v [B, G, T, E], doc_ids [B, T] -> [B, H, T, E]."""
    if ends is not None and dropout == 0 and softcap is None and _backend == "auto" and takes(q):
        return document_attention(q, k, v, ends, window)
    whole = all(len(row) == 1 and row[0] > 0 for row in segments) if segments is not None else doc_ids is None
    plain = q.device.type == "cpu" and not torch.compiler.is_compiling() and _backend == "auto" and not gpu_is_planned()
    if window is not None and window < q.shape[2]:
        if dropout == 0 and softcap is None and plain and (whole or segments is not None):
            return block_causal(q, k, v, segments if segments is not None else ((q.shape[2],),) * q.shape[0], window)
        return sliding_window_attention(q, *_expand_groups(q, k, v), window, None if whole else doc_ids, softcap, dropout)
    if softcap is not None:
        return attention_reference(q, k, v, None if whole else doc_ids, dropout, softcap)
    if dropout > 0 or (segments is None and not whole):
        return attention_reference(q, k, v, None if whole else doc_ids, dropout)
    if not plain:
        if whole:
            return _sdpa(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return attention_reference(q, k, v, doc_ids)
    return block_causal(q, k, v, segments if segments is not None else ((q.shape[2],),) * q.shape[0])


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, softcap: float | None = None) -> Tensor:
    """q [B, H, T, E] at positions [B, T] over a cache k, v [B, G, S, E]: key s is seen by positions >= s."""
    mask = positions[:, None, :, None] >= torch.arange(k.shape[2], device=q.device)
    return _masked(q, k, v, mask, softcap=softcap)


def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """q [B, H, T, E] over all of k, v [B, G, S, E]. mask: bool, [B, S] (keys that are real) or [B, T, S] (keys that each query
    sees; each sees one at least)."""
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None]
    if q.device.type != "cpu":
        return _sdpa(q, *_expand_groups(q, k, v), attn_mask=None if mask is None else mask[:, None], dropout_p=dropout)
    # On a CPU as two products, which torch's FlopCounterMode counts; its fused kernel there it does not know.
    k, v = _expand_groups(q, k, v)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(-1), dropout, dropout > 0) @ v
