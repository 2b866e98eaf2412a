"""The flat ternary recurrence over bytes: every matrix product of the model has weights of -1, 0 and 1."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from treadle.layers.hgrn import RecurrentState, linear
from treadle.layers.reproducible import ReproducibleRMSNorm
from treadle.models.backbone import Backbone
from treadle.models.base import Capabilities, ParameterRule
from treadle.models.recurrent import INTO_STREAM, Block, Mixer, RecurrentConfig, block_initial, block_rule
from treadle.settings import option


class HGRNBitConfig(RecurrentConfig):
    """The ternary recurrence's keys."""

    hidden_size: int = option(256, aliases=("d_model", "dim"), ge=1)
    """Width D of the residual stream."""

    num_layers: int = option(6, aliases=("n_layers", "num_hidden_layers", "layers"), ge=1, le=4096)
    """Number of blocks."""

    lower_bound: bool = option(False, aliases=("use_lower_bound",))
    """Deeper blocks forget less: a learned bound on their gates that grows with depth."""

    tie_embeddings: bool = option(False, aliases=("tie_word_embeddings",))
    """The head shares the embedding's weights (not with ternary: the head's are rounded)."""

    @model_validator(mode="after")
    def _shapes(self) -> HGRNBitConfig:
        self.check_widths(self.hidden_size)
        if self.ternary and self.tie_embeddings:
            raise ValueError("tie_embeddings with ternary would round the embedding; leave it out, or use --ternary false")
        return self

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        return {"slm_base": {"vocab_size": 256, "hidden_size": 512, "num_layers": 6}}

    @classmethod
    def preset_sizes(cls) -> dict[str, float]:
        """Parameters of each preset, exactly."""
        return {"slm_base": 25_465_856}

    @classmethod
    def recommended(cls, preset: str | None) -> dict[str, Any]:
        if (preset or "").lower().replace("-", "_") != "slm_base":
            return {}
        return {"optim.learning_rate": 3e-4, "tokenizer.name": "byte", "train.per_device_train_batch_size": 32,
                "train.max_steps": 15_000}  # fmt: skip


class HGRNBit(Backbone):
    """Ternary gated linear recurrence over bytes (MatMul-free LM, arXiv 2406.02528); decoding state of constant size."""

    arch = "hgrn_bit"
    Config = HGRNBitConfig
    config: HGRNBitConfig

    def __init__(self, config: HGRNBitConfig) -> None:
        norm = ReproducibleRMSNorm(config.hidden_size, config.norm_eps)
        super().__init__(config, config.hidden_size, config.num_layers, norm, config.tie_embeddings)
        if config.ternary:
            self.capabilities = Capabilities(rounds=True)
            self.head = linear(config.hidden_size, config.vocab_size, True)  # type: ignore[assignment]

    def make_block(self, index: int) -> nn.Module:
        mixer: Mixer = "hgrn_bit" if self.config.ternary else "hgrn"
        return Block(self.config, self.config.hidden_size, mixer, bounded=self.config.lower_bound)

    def layer_state(self, index: int, batch_size: int, max_len: int, device: Any, dtype: Any) -> RecurrentState:
        return self.layers[index].new_state(batch_size, max_len, device, dtype)  # type: ignore[operator]

    def flops(self, length: int) -> int:
        c = self.config
        return c.num_layers * self.layers[0].flops(length) + 2 * length * c.hidden_size * c.vocab_size  # type: ignore[operator]

    def parameter_rules(self) -> dict[str, ParameterRule]:
        return {name: rule for name, _ in self.named_parameters() if (rule := block_rule(name)) != ParameterRule()}

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        if name.endswith("lower_bound"):  # from forgetting freely to a memory of 50 positions, by depth
            depth = int(name.split(".")[1]) / max(1, self.config.num_layers - 1)
            return torch.full(parameter.shape, -4.0 + 8.0 * depth)
        special = block_initial(name, parameter)
        if special is not None:
            return special
        std = self.config.initializer_range
        return std / (2 * self.config.num_layers) ** 0.5 if name.endswith(INTO_STREAM) else std
