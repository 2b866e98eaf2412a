"""An architecture of somebody's own that names treadle's public names alone: a mean of what was read so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import treadle


class MeanConfig(treadle.LanguageModelConfig):
    """Keys."""

    hidden_size: int = treadle.option(32, ge=1)
    """Width."""


@dataclass
class Total(treadle.LayerState):
    """The sum [B, 1, D] and the number of tokens [B, 1] of each row."""

    sums: Tensor
    count: Tensor


class Mean(treadle.Model):
    """Its logits read the last token and the mean of all."""

    Config = MeanConfig

    def __init__(self, config: MeanConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(self, batch: treadle.Batch, state: treadle.State | None = None) -> treadle.Output:
        real = torch.ones_like(batch.input_ids) if batch.doc_ids is None else (batch.doc_ids >= 0).long()
        x = self.embedding(batch.input_ids) * real[..., None]
        sums, count = x.cumsum(1), real.cumsum(1)
        if state is not None:
            state.token_positions(*batch.input_ids.shape, batch.doc_ids, batch.segments)
            total = state.layers[0]
            sums, count = sums + total.sums, count + total.count
            total.sums, total.count = sums[:, -1:], count[:, -1:]
        return treadle.Output(hidden=x + sums / count.clamp_min(1)[..., None], state=state)

    def new_state(self, batch_size: int, max_len: int, device: Any = None, dtype: Any = None) -> treadle.State:
        lengths = torch.zeros(batch_size, dtype=torch.int64, device=device or self.device)
        total = Total(torch.zeros(batch_size, 1, self.config.hidden_size, device=lengths.device), lengths[:, None])
        return treadle.State(lengths, [0] * batch_size, max_len, [total])
