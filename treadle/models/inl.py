"""The dense transformer with INL dynamics on: every key of models/transformer.py, and one other default."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from treadle.models.dynamics_keys import SWITCH
from treadle.models.transformer import Transformer, TransformerConfig
from treadle.settings import option


class INLConfig(TransformerConfig):
    """The transformer's keys, with dynamics = full."""

    dynamics: Literal["none", "full", "lite"] = option(
        "full", aliases=("use_inl_dynamics", "inl_dynamics", "use_dynamics", "use_inl"), spellings=SWITCH
    )
    """INL dynamics in every block: full (each token chooses its gains), lite (constant gains, only mu is learned)."""

    normuon_rates: ClassVar[dict[str, float]] = {}  # not measured

    @classmethod
    def presets(cls) -> dict[str, dict[str, Any]]:
        """The transformer's. The smallest would be 9% larger than its name with its controllers: its MLP is narrower."""
        found = super().presets()
        return {**found, "nano": {**found["nano"], "intermediate_size": 768}}


class INL(Transformer):
    """Transformer whose blocks carry a velocity over depth (layers/dynamics.py)."""

    arch = "inl"
    Config = INLConfig
