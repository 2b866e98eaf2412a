"""State-space duality (Mamba-2, Dao and Gu 2024, arXiv 2405.21060): a linear recurrence with a scalar decay, computed in
chunks by matrix products.

    H_t = exp(la_t) H_{t-1} + b_t (x) x_t        [N, P] for each head
    y_t = c_t . H_t

x [B, H, T, P], log_decay la [B, H, T] <= 0, b and c [B, H, T, N]; everything in fp32 (fp64 stays). Documents packed into a
row are kept apart by `documents` [B, T] (each in one piece).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def chunk_size(length: int) -> int:
    """Positions in a chunk: the products inside cost length x chunk, the loop length / chunk."""
    return min(CHUNK, length)


def ssd_reference(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, documents: Tensor | None = None, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one position after the other: (y [B, H, T, P], last state [B, H, N, P])."""
    state = initial if initial is not None else x.new_zeros(*b.shape[:2], b.shape[3], x.shape[3])
    out = []
    for t in range(x.shape[2]):
        if documents is not None and t > 0:
            goes_on = (documents[:, t] == documents[:, t - 1]).to(x.dtype)
            state = state * goes_on[:, None, None, None]
        state = step(state, x[:, :, t], log_decay[:, :, t], b[:, :, t])
        out.append(torch.einsum("bhn,bhnp->bhp", c[:, :, t], state))
    return torch.stack(out, 2), state


def step(state: Tensor, x: Tensor, log_decay: Tensor, b: Tensor) -> Tensor:
    """One position: state [B, H, N, P], x [B, H, P], log_decay [B, H], b [B, H, N] -> the state after it."""
    return state * log_decay.exp()[..., None, None] + b[..., :, None] * x[..., None, :]


def ssd(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, documents: Tensor | None = None, initial: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in chunks: (y [B, H, T, P], last state [B, H, N, P]). `initial` is the state before the first position, of
    the first position's document. The loop runs over chunks only."""
    length, size = x.shape[2], chunk or chunk_size(x.shape[2])
    spare = -length % size
    if spare:  # positions that change nothing: no decay, no input
        x, b, c = (F.pad(t, (0, 0, 0, spare)) for t in (x, b, c))
        log_decay = F.pad(log_decay, (0, spare))
        documents = F.pad(documents[:, None].float(), (0, spare), mode="replicate")[:, 0] if documents is not None else None
    x, b, c, decay = (t.unflatten(2, (-1, size)) for t in (x, b, c, log_decay))  # [B, H, C, Q, ...]
    total = decay.cumsum(-1)
    gap = total[..., :, None] - total[..., None, :]
    seen = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    left, right, carried = total, total[..., -1:] - total, total[..., -1]
    if documents is not None:
        own = documents.unflatten(1, (-1, size))[:, None]  # [B, 1, C, Q]
        ends = own[..., -1]
        before = torch.cat([own[:, :, :1, 0], ends[:, :, :-1]], 2)  # the document that reaches into each chunk
        seen = seen & (own[..., :, None] == own[..., None, :])
        # Sums over j < k <= i alone: a difference of running sums would carry the rounding of earlier documents.
        later = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(-1)
        gap = decay[..., :, None].where(later, 0.0).cumsum(-2)
        right = gap[..., -1, :]
        left = left.masked_fill(own != before[..., None], float("-inf"))
        right = right.masked_fill(own != ends[..., None], float("-inf"))
        carried = carried.masked_fill(ends != before, float("-inf"))
    # Masked before the exponential: above the diagonal the gap is positive and would overflow.
    weights = gap.masked_fill(~seen, float("-inf")).exp()
    y = ((c @ b.transpose(-1, -2)) * weights) @ x
    added = (b * right.exp()[..., None]).transpose(-1, -2) @ x  # [B, H, C, N, P], what each chunk leaves behind
    state = initial.to(x.dtype) if initial is not None else torch.zeros_like(added[:, :, 0])
    keep, entering = carried.exp()[..., None, None], []
    for index in range(added.shape[2]):
        entering.append(state)
        state = keep[:, :, index] * state + added[:, :, index]
    y = y + (c * left.exp()[..., None]) @ torch.stack(entering, 2)
    return y.flatten(2, 3)[:, :, :length], state


def ssd_flops(length: int, heads: int, inner: int, width: int) -> int:
    """Floating-point operations of the products of one row (inner N, width P)."""
    size = chunk_size(length)
    padded = -(-length // size) * size
    return 2 * heads * padded * (size * (inner + width) + 2 * inner * width)
