"""An architecture of somebody's own: two recurrences."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from treadle.layers.hgrn import HGRN
from treadle.layers.reproducible import ReproducibleRMSNorm
from treadle.models.backbone import Backbone
from treadle.models.base import LanguageModelConfig
from treadle.settings import option


class MineConfig(LanguageModelConfig):
    """Keys."""

    hidden_size: int = option(32)
    """Width."""


class MineBlock(nn.Module):
    """One recurrence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ReproducibleRMSNorm(width, 1e-6)
        self.attention = HGRN(width, width, heads=1, ternary=False)

    def forward(self, x: Tensor, context: Any, state: Any = None) -> Tensor:
        return x + self.attention(self.norm(x), context, state)


class Mine(Backbone):
    """Two of them."""

    arch = "mine"
    Config = MineConfig

    def __init__(self, config: MineConfig) -> None:
        super().__init__(config, config.hidden_size, 2, ReproducibleRMSNorm(config.hidden_size, 1e-6), False)

    def make_block(self, index: int) -> nn.Module:
        return MineBlock(self.config.hidden_size)

    def layer_state(self, index: int, batch_size: int, max_len: int, device: Any, dtype: Any) -> Any:
        return self.layers[index].attention.new_state(batch_size, max_len, device, dtype)  # type: ignore[operator, union-attr]
