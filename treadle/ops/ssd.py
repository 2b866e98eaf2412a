"""State-space duality (Mamba-2, Dao and Gu 2024, arXiv 2405.21060): a linear recurrence with a scalar decay, computed in
chunks by matrix products (on a CPU by a compiled loop, ops/memories.py).

    H_t = exp(la_t) H_{t-1} + b_t (x) x_t        [N, P] for each head
    y_t = c_t . H_t

x [B, H, T, P], log_decay la [B, H, T] <= 0, b and c [B, H, T, N]; everything in fp32 (fp64 stays). Dimensions B and H of
log_decay, and H of b and c together, may be 1 where all share them. Documents packed into a row are kept apart by
`documents` [B, T] (each in one piece).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.ops.memories import available, recurrence

CHUNK = 64


def chunk_size(length: int) -> int:
    """Positions in a chunk: the products inside cost length x chunk, the loop length / chunk."""
    return min(CHUNK, length)


def ssd_reference(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, documents: Tensor | None = None, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, one position after the other: (y [B, H, T, P], last state [B, H, N, P])."""
    state = initial if initial is not None else x.new_zeros(*b.shape[:2], b.shape[3], x.shape[3])

    def at(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = step(state, x[:, :, t], log_decay[:, :, t], b[:, :, t])
        return torch.einsum("bhn,bhnp->bhp", c[:, :, t], state), state

    return one_by_one(at, x.shape[2], state, documents)


def one_by_one(
    at: Callable[[int, Tensor], tuple[Tensor, Tensor]], length: int, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A recurrence as it stands: at(t, state [B, H, N, P]) gives (y [B, H, P], the state after position t), the state being
    zero where a document begins. (y [B, H, T, P], last state)."""
    out = []
    for t in range(length):
        if documents is not None and t > 0:
            goes_on = (documents[:, t] == documents[:, t - 1]).to(state.dtype)
            state = state * goes_on[:, None, None, None]
        y, state = at(t, state)
        out.append(y)
    return torch.stack(out, 2), state


def step(state: Tensor, x: Tensor, log_decay: Tensor, b: Tensor) -> Tensor:
    """One position: state [B, H, N, P], x [B, H, P], log_decay [B, H], b [B, H, N] -> the state after it."""
    return state * log_decay.exp()[..., None, None] + b[..., :, None] * x[..., None, :]


def ssd(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, documents: Tensor | None = None, initial: Tensor | None = None,
    chunk: int | None = None, precise: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in chunks: (y [B, H, T, P], last state [B, H, N, P]). `initial` is the state before the first position, of
    the first position's document. The loop runs over chunks only. `precise`: see chunk_decays."""
    if chunk is None and available(x, log_decay, b, c, initial):
        return recurrence("sum", c, b, x, log_decay, documents, initial)
    length, size = x.shape[2], chunk or chunk_size(x.shape[2])
    x, b, c, decay, documents = in_chunks(size, x, b, c, log_decay, documents)  # [B, H, C, Q, ...]
    weights, left, right, keep = chunk_decays(decay, documents, precise)
    y = ((c @ b.transpose(-1, -2)) * weights) @ x
    added = (b * right[..., None]).transpose(-1, -2) @ x  # [B, H, C, N, P], what each chunk leaves behind
    state = initial.to(x.dtype) if initial is not None else torch.zeros_like(added[:, :, 0])
    keep, entering = keep[..., None, None], []
    for index in range(added.shape[2]):
        entering.append(state)
        state = keep[:, :, index] * state + added[:, :, index]
    y = y + (c * left[..., None]) @ torch.stack(entering, 2)
    return y.flatten(2, 3)[:, :, :length], state


def in_chunks(size: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Tensors [B, H, T, ...], the last one documents [B, T] or None -> [B, H, C, Q, ...] and [B, 1, C, Q]. A last chunk is
    filled with zeros, positions that change nothing (no decay, no input), of the last position's document."""
    *given, documents = tensors
    cut = []
    for t in given:
        assert t is not None
        spare = -t.shape[2] % size
        if spare:
            t = F.pad(t, (0, 0) * (t.dim() - 3) + (0, spare))
        cut.append(t.unflatten(2, (-1, size)))
    if documents is not None:
        spare = -documents.shape[1] % size
        if spare:
            documents = torch.cat([documents, documents[:, -1:].expand(-1, spare)], 1)
        documents = documents.unflatten(1, (-1, size))[:, None]
    return (*cut, documents)


def chunk_documents(documents: Tensor) -> tuple[Tensor, Tensor]:
    """documents [B, 1, C, Q] -> [B, 1, C]: the one that reaches into each chunk from before it, and the one at its end."""
    ends = documents[..., -1]
    return torch.cat([documents[:, :, :1, 0], ends[:, :, :-1]], 2), ends


def chunk_decays(decay: Tensor, documents: Tensor | None, precise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log decays [B, H, C, Q], documents [B, 1, C, Q] or None -> how much is left: at each position of each earlier one in
    its chunk [.., Q, Q] (its own: 1), at each position of the state before the chunk [.., Q], at the end of what each
    position added [.., Q], at the end of the state before [..].

    What is left between two positions is a difference of running sums, whose rounding is that of all decays before; with
    documents, and where it is to be `precise`, a sum of the decays between: after one of -480 (a gate at 30 and a rate of
    16) a decay of -.5 is wrong by up to 3e-5 in fp32 otherwise. Forward and backward take 1.16 times as long."""
    size = decay.shape[-1]
    total = decay.cumsum(-1)
    gap = total[..., :, None] - total[..., None, :]
    seen = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril()
    left, right, carried = total, total[..., -1:] - total, total[..., -1]
    if documents is not None or precise:  # sums over j < k <= i alone
        later = torch.ones(size, size, dtype=torch.bool, device=decay.device).tril(-1)
        gap = decay[..., :, None].where(later, 0.0).cumsum(-2)
        right = gap[..., -1, :]
    if documents is not None:
        before, ends = chunk_documents(documents)
        seen = seen & (documents[..., :, None] == documents[..., None, :])
        left = left.masked_fill(documents != before[..., None], float("-inf"))
        right = right.masked_fill(documents != ends[..., None], float("-inf"))
        carried = carried.masked_fill(ends != before, float("-inf"))
    # Masked before the exponential: above the diagonal the gap is positive and would overflow.
    return gap.masked_fill(~seen, float("-inf")).exp(), left.exp(), right.exp(), carried.exp()


def ssd_flops(length: int, heads: int, inner: int, width: int, shared: bool = False) -> int:
    """Floating-point operations of the products of one row (inner N, width P); `shared`: b and c have one head for all."""
    size = chunk_size(length)
    padded = -(-length // size) * size
    scores = size * inner * (1 if shared else heads)
    return 2 * padded * (scores + heads * (size * width + 2 * inner * width))
