"""Rows for the byte models' tests."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from treadle.data.batch import Batch
from treadle.models.base import Model

DOCUMENTS = ((3, 14), (14, 28))  # of a row of 30 positions; padding before and after


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def doc_ids() -> Tensor:
    """DOCUMENTS as doc_ids [1, 30]."""
    made = torch.full((1, 30), -1)
    for number, (start, stop) in enumerate(DOCUMENTS):
        made[0, start:stop] = number
    return made


def packed_and_alone(model: Model) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of each document in a packed, padded row, and by itself."""
    tokens = ids(1, 30)
    with torch.no_grad():
        packed = model(Batch.from_ids(tokens, doc_ids=doc_ids())).logits
        for start, stop in DOCUMENTS:
            yield packed[:, start:stop], model(Batch.from_ids(tokens[:, start:stop])).logits
