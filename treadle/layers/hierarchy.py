"""Learned chunks: a router that decides where a chunk begins, and the way into and out of a shorter sequence (H-Net, Hwang,
Wang and Gu 2025, arXiv 2507.07955)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treadle.layers.reproducible import ReproducibleLinear, to_reproducible
from treadle.layers.state import LayerState, advance_positions
from treadle.ops.documents import document_starts
from treadle.ops.precision import without_autocast
from treadle.ops.scan import scan

CLAMP = 1e-4
THRESHOLD = 0.5


@dataclass
class StageState(LayerState):
    """last [B, D], the router's last input; seen [B], whether there was one; smoothed [B, D'], the de-chunker's last value."""

    last: Tensor
    seen: Tensor
    smoothed: Tensor


@dataclass
class PositionCounter(LayerState):
    """lengths [B]: tokens so far, for blocks that know positions."""

    lengths: Tensor

    def advance(self, token_mask: Tensor) -> Tensor:
        """The position ids of the next tokens [B, T]."""
        positions, self.lengths = advance_positions(self.lengths, token_mask)
        return positions.clamp_min(0)


@dataclass
class Boundaries:
    """probability p [B, T], and mask [B, T]: a chunk begins here; never on padding."""

    probability: Tensor
    mask: Tensor


class BoundaryRouter(nn.Module):
    """p_t = (1 - cos(Wq x_{t-1}, Wk x_t)) / 2: a chunk begins where a position is unlike the one before it. 1 at every document
    start. Full precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = ReproducibleLinear(width, width, bias=False)
        self.key = ReproducibleLinear(width, width, bias=False)

    def forward(
        self, x: Tensor, token_mask: Tensor, doc_ids: Tensor | None = None, state: StageState | None = None
    ) -> Boundaries:
        """x [B, T, D]; token_mask [B, T], with a state all tokens before the padding."""
        with without_autocast(x):
            x = x.float()
            before = F.pad(x, (0, 0, 1, 0))[:, :-1]
            if state is not None:
                before = torch.cat([state.last[:, None], before[:, 1:]], 1)
            similar = F.cosine_similarity(to_reproducible(self.query(before)), to_reproducible(self.key(x)), dim=-1, eps=1e-8)
            p = ((1.0 - similar) / 2.0).clamp(0.0, 1.0).float()
        first = torch.zeros_like(token_mask)
        if state is not None:
            first[:, 0] = ~state.seen
        elif doc_ids is not None:
            first = document_starts(doc_ids)
        else:
            first[:, 0] = True
        p = torch.where(first, 1.0, p)
        return Boundaries(p, (p > THRESHOLD) & token_mask)


def straight_through(x: Tensor) -> Tensor:
    """1 forward, the gradient of x backward. x of any shape."""
    return 1.0 + x - x.detach()


def compact(x: Tensor, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The positions of x [B, T, ...] where mask [B, T] is true, moved to the front: ([B, longest, ...], their index in x
    [B, longest])."""
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
    index = order.view(*order.shape, *(1,) * (x.dim() - 2)).expand(*order.shape, *x.shape[2:])
    return x.gather(1, index), order


def smooth(
    chunks: Tensor, probability: Tensor, doc_ids: Tensor | None, token_mask: Tensor, start: Tensor | None = None
) -> Tensor:
    """z_j = P_j c_j + (1 - P_j) z_{j-1} over chunks [B, M, D], starting anew in each document, or going on from `start`;
    padding changes nothing."""
    p = probability.clamp(CLAMP, 1.0 - CLAMP)[..., None]
    gate, value = 1.0 - p, p * chunks.float()
    if doc_ids is not None:
        gate = gate.masked_fill(document_starts(doc_ids)[..., None], 0.0)
    gate = torch.where(token_mask[..., None], gate, 1.0)
    value = torch.where(token_mask[..., None], value, 0.0)
    return scan(gate.expand_as(value), value, start)


def planned_chunks(length: int, ratio: float, training: bool, outermost: bool) -> int:
    """Chunks of the longest row of `length` positions, where only memory is planned: length / ratio, as the ratio loss wants.
    A training needs most memory where it begins, with a router that has learned nothing: cosines of random projections are
    positive as often as negative, so half of the positions begin a chunk; those are by choice unlike the one before, so a
    stage inside cuts at three quarters (text, 3 seeds: .35-.55 and .69-.73; longest of 8 rows .42-.59 and .73-.79). The
    longest of about eight rows is 1.5 deviations above the mean."""
    share = 0.5 if outermost else 0.75
    untrained = length * share + 1.5 * math.sqrt(length * share * (1.0 - share))
    return min(length, math.ceil(max(length / ratio, untrained if training else 0.0)))


def most_chunks(boundary_mask: Tensor, planned: int) -> int:
    """Chunks of the row that has most: the one number the host has to know. Of tensors without contents (when memory is
    planned), `planned`. boundary_mask: bool [B, T]."""
    if boundary_mask.is_meta or type(boundary_mask) is not Tensor:
        return planned
    return int(boundary_mask.sum(1).max())


def ratio_loss(found: Boundaries, token_mask: Tensor, target: float) -> Tensor:
    """[B], with N = target: N / (N - 1) ((N - 1) F G + (1 - F)(1 - G)), F the share of positions where a chunk begins and G
    the mean probability. Of each row by itself, so that it does not matter which rows share a pass."""
    count = token_mask.sum(1).clamp_min(1)
    rate = found.mask.sum(1) / count
    mean = (found.probability * token_mask).sum(1) / count
    return target / (target - 1.0) * ((target - 1.0) * rate * mean + (1.0 - rate) * (1.0 - mean))


def empty_state(rows: int, width: int, inner: int, device: Any) -> StageState:
    """The state of a stage that has seen nothing: rows [B], widths D outside and D' inside."""
    return StageState(
        torch.zeros(rows, width, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
        torch.zeros(rows, inner, device=device),
    )
