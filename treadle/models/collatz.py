"""The multi-task model of Collatz trajectories: a dense transformer over parities or digits with two heads.

lm_head predicts the next step's parity at each position; `stopping` predicts log(1 + stopping time) from the mean of the
row's hidden states over its real positions. `causal = false` lets every position see the whole row, for comparison: what
its lm_head then gets right is no prediction, for it sees the step that it names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treadle.data.batch import Batch
from treadle.layers.bidirectional_attention import BidirectionalAttention
from treadle.layers.state import State
from treadle.layers.token_mixers import TokenMixer
from treadle.models.base import Capabilities, Output
from treadle.models.transformer import Transformer, TransformerConfig
from treadle.settings import option

STOPPING = "stopping"  # in Output.predictions


class CollatzConfig(TransformerConfig):
    """The keys of the Collatz model: those of the dense transformer, and of its second head."""

    vocab_size: int = option(2, ge=2)
    """Number of tokens: the two parities, or the digits of a base; follows from the data."""

    causal: bool = option(True)
    """A position sees what stands before it. False: the whole row (the next step is then seen, not predicted)."""

    stopping_head: bool = option(True)
    """The head for the stopping time."""

    stopping_mean: float = option(0.0, allow_inf_nan=False)
    """Where that head starts, in log(1 + steps); follows from the data."""

    stopping_deviation: float = option(1.0, gt=0.0, allow_inf_nan=False)
    """Its unit, in log(1 + steps); follows from the data."""

    def mixer(self, layer: int) -> type[TokenMixer]:
        return super().mixer(layer) if self.causal else BidirectionalAttention

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {}

    @classmethod
    def recommended(cls, preset: str | None) -> dict[str, Any]:
        return {"data.dataset_class": "collatz", "train.objective": "collatz"}


class Collatz(Transformer):
    """A dense transformer with a head for the next step and one for the stopping time."""

    arch = "collatz"
    Config = CollatzConfig
    config: CollatzConfig

    def __init__(self, config: CollatzConfig) -> None:
        super().__init__(config)
        if not config.causal:
            self.capabilities = Capabilities(causal=False, decodes=False)
        self.stopping = nn.Linear(config.hidden_size, 1) if config.stopping_head else None

    def stopping_time(self, hidden: Tensor, batch: Batch) -> Tensor:
        """hidden [B, T, D] -> log(1 + stopping time) [B], from the mean over each row's real positions."""
        assert self.stopping is not None
        if batch.is_unpacked:
            pooled = hidden.mean(1, dtype=torch.float32)
        else:
            real = batch.token_mask[:, :, None]
            pooled = (hidden * real).sum(1, dtype=torch.float32) / real.sum(1).clamp_min(1)
        return self.config.stopping_mean + self.config.stopping_deviation * self.stopping(pooled)[:, 0].float()

    def forward(self, batch: Batch, state: State | None = None) -> Output:
        out = super().forward(batch, state)
        if self.stopping is not None and state is None:
            assert out.hidden is not None
            out.predictions[STOPPING] = self.stopping_time(out.hidden, batch)
        return out

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        return "zeros" if name == "stopping.bias" else super().initial(name, parameter)

    def flops(self, length: int) -> int:
        return super().flops(length) + (2 * self.config.hidden_size if self.stopping is not None else 0)
