"""The [distill] section, and the [task] keys of objectives for language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from treadle.settings import Settings, option

DEFAULT_OBJECTIVE = "next_token"  # train.objective of language models
Stage = Literal["mixer", "hidden", "logits"]


class DistillSettings(Settings):
    """What a student learns from a teacher: `treadle distill`."""

    teacher: str | None = option(None, aliases=("teacher_path", "teacher_model"), change="guarded")
    """A run, a checkpoint or an exported folder."""

    stages: list[Stage] = option(["mixer", "logits"])
    """In this order: mixer (each mixer alone, on the teacher's own inputs), hidden (the stream after each block), logits."""

    stage: Stage | None = option(None, change="guarded")
    """The stage of one run; `treadle distill` sets it."""

    mixer_steps: int | None = option(None, ge=1)
    """Steps of the mixer stage, out of max_steps; default a quarter of them."""

    hidden_steps: int | None = option(None, ge=1)
    """Steps of the hidden stage, out of max_steps; default a quarter of them."""

    carry_weights: bool = option(True, change="guarded")
    """The student starts with every weight of the teacher that has its name and shape."""

    distill_temperature: float = option(2.0, aliases=("temperature",), gt=0.0)
    """Both distributions are flattened by it; the divergence is multiplied by its square."""

    alpha_ce: float = option(0.5, ge=0.0)
    """Weight of the cross-entropy with the text in the logits stage."""

    alpha_kd: float = option(0.5, ge=0.0)
    """Weight of the divergence from the teacher in the logits stage."""

    @model_validator(mode="after")
    def _sound(self) -> DistillSettings:
        order = ["mixer", "hidden", "logits"]
        if not self.stages or self.stages != [name for name in order if name in self.stages]:
            raise ValueError(f"stages = {self.stages}: name some of mixer, hidden, logits, once each and in this order")
        if self.alpha_ce == self.alpha_kd == 0:
            raise ValueError("alpha_ce and alpha_kd are both 0, so there is nothing to learn; raise one of the two")
        return self


def _loss_type(value: Any) -> dict[str, Any]:
    """trl's word for the form of the loss; DPO's own is the one there is."""
    if value not in ("sigmoid", ["sigmoid"]):
        raise ValueError
    return {}


class PreferenceSettings(Settings):
    """How strongly preferences pull the model away from where it started."""

    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {"loss_type": _loss_type}

    beta: float = option(0.1, aliases=("dpo_beta",), change="guarded", gt=0.0, allow_inf_nan=False)
    """What the difference of log-probabilities is multiplied by: the smaller, the further the model may move from the reference."""

    label_smoothing: float = option(0.0, change="guarded", ge=0.0, lt=0.5)
    """The share of pairs that are assumed to be the wrong way round."""

    reference: str | None = option(None, aliases=("ref_model", "reference_model"), change="guarded")
    """The model whose answers the trained one is held to: a run, a checkpoint or a folder. Written by treadle from --from; a model with
    adapters is held to itself without them."""

    reference_seed: int | None = option(None, change="guarded")
    """Written by treadle where nothing was named by --from: the seed that the weights of the start are drawn from."""

    reference_checksum: str | None = option(None, change="guarded")
    """Written by treadle: the checksum of the reference's weights. A run does not go on with other ones."""
