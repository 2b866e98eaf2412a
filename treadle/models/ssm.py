"""The state-space model that a transformer or multi-stream transformer is distilled into, also trainable from scratch: the
same blocks with layers/ssm.py in place of attention, and a decoding state of constant size."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator
from torch import Tensor, nn

from treadle.layers.ssm import SSMMixer
from treadle.models.base import ParameterRule
from treadle.models.shc import SHC, SHCConfig
from treadle.settings import option


class SSMConfig(SHCConfig):
    """The state-space model's keys: those of shc (num_streams = 1: one plain residual stream), and its mixer's."""

    local_window: int = option(16, aliases=("window_size", "sliding_window"), ge=0)
    """Last positions that are also seen by softmax attention, in a ring; 0 is a pure state-space model."""

    feature_map: Literal["hedgehog", "none"] = option("hedgehog")
    """What queries and keys become before they meet the state: softmax of +- a learned map, or themselves."""

    normalizer: bool = option(True)
    """The state also sums the weights, and the answer is divided by them, as in softmax attention."""

    @model_validator(mode="after")
    def _mixer_fits(self) -> SSMConfig:
        if self.latent_size is not None:
            raise ValueError("latent_size is for attention's cache; a state-space model has none: leave it out")
        if self.normalizer and self.feature_map == "none":
            raise ValueError("normalizer divides by a sum of weights, which may be zero or negative with feature_map = none; "
                             "use --normalizer false or --feature_map hedgehog")  # fmt: skip
        return self


class SSM(SHC):
    """State-space duality (Dao and Gu 2024, arXiv 2405.21060) with softmax features and a local window."""

    arch = "ssm"
    Config = SSMConfig
    config: SSMConfig

    def make_mixer(self) -> nn.Module:
        config = self.config
        return SSMMixer(config.hidden_size, config.num_heads, config.groups, config.width_of_head,
                        window=config.local_window, features=config.feature_map, normalizer=config.normalizer,
                        qk_norm=config.qk_norm, eps=config.norm_eps)  # fmt: skip

    def parameter_rules(self) -> dict[str, Any]:
        maps = [n for n, _ in self.named_parameters() if n.endswith(("_features", "decay.weight"))]
        return {**super().parameter_rules(), **{n: ParameterRule(weight_decay=False) for n in maps}}

    def initial(self, name: str, parameter: Tensor) -> float | str | Tensor:
        own = SSMMixer.initial(name, parameter)
        return super().initial(name, parameter) if own is None else own
