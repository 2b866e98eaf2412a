"""The gated linear recurrent unit as a token mixer (HGRN, Qin et al. 2023, arXiv 2311.04823)."""

from __future__ import annotations

from typing import Any

from treadle.layers.hgrn import HGRN
from treadle.layers.mixers.parts import ConvolvedMixer


class HGRNMixer(HGRN, ConvolvedMixer):
    """f = sigmoid(F x), i = silu(I x) (1 - f), h_t = f_t h_{t-1} + i_t for each channel, y = O (norm(h) * silu(G x)), in full
    precision, with a short convolution of F x and I x where the model asks for one."""

    @classmethod
    def from_config(cls, config: Any, layer: int) -> HGRNMixer:
        return cls(
            config.hidden_size, config.expanded(1) * config.hidden_size, heads=config.num_heads, ternary=False, gate="hgrn",
            convolution=config.convolution_size, eps=config.norm_eps,
        )  # fmt: skip
