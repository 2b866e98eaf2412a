"""Where the documents of packed rows begin, from doc_ids [B, T] alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Segments = tuple[tuple[int, ...], ...]  # of each row, the lengths of its documents; negative: a run of padding


def document_starts(doc_ids: Tensor) -> Tensor:
    """The first position of every document (or run of padding), bool [B, T]."""
    return F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)


def document_positions(doc_ids: Tensor) -> Tensor:
    """Each position's number within its document, int64 [B, T]."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand(doc_ids.shape)
    return index - torch.where(document_starts(doc_ids), index, 0).cummax(1).values
