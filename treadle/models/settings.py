"""The [adapter] section."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from treadle.settings import Fallback, Settings, option

ALL_LINEAR = "all-linear"
USUAL_RANK = 16  # where a switch of another trainer asks for adapters without one


def _switched(key: str, value: Any) -> Callable[[Any], dict[str, Any]]:
    """A switch of other trainers that sets a key where nothing else does."""

    def translate(on: Any) -> dict[str, Any]:
        if not isinstance(on, bool):
            raise ValueError
        return {key: Fallback(value)} if on else {}

    return translate


class AdapterSettings(Settings):
    """Training a product of low rank beside each linear layer (LoRA) instead of the weights of a trained model."""

    lora_rank: int | None = option(None, aliases=("r", "lora_r"), change="fixed", ge=1)
    """Rank of the adapters; with it the model of --from stays as it is and the adapters alone are trained and saved."""

    lora_alpha: float | None = option(None, change="fixed", gt=0, allow_inf_nan=False)
    """The adapters' products are multiplied by lora_alpha / lora_rank; default 2 lora_rank."""

    lora_dropout: float = option(0.0, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that are set to 0 while training; not of layers whose weights are read in place (the controllers of
    dynamics, the gates of ssm and some linear mixers), which a training names in its first lines."""

    lora_targets: list[str] = option([ALL_LINEAR], aliases=("target_modules", "lora_target_modules"), change="fixed")
    """Which linear layers: all-linear (all but the head), or ends of their names (query, mlp.down), or patterns (layers.0.*).
    Names that transformers gives them (q_proj) are known."""

    use_rslora: bool = option(False, change="fixed")
    """Divide lora_alpha by the root of the rank instead (rsLoRA), so that the rate need not follow the rank."""

    base_precision: Literal["fp32", "bf16", "int8"] = option(
        "fp32", aliases=("base_dtype",), change="fixed", spellings={"float32": "fp32", "bfloat16": "bf16", "8bit": "int8"}
    )
    """What the frozen linear layers (all but the head) are held in while training."""

    base_model: str | None = option(None, aliases=("base_model_name_or_path",))
    """Where the frozen model is; written by treadle from --from. Give it anew where that was moved."""

    base_checksum: str | None = option(None, change="fixed")
    """Written by treadle: the checksum of the frozen model's weights."""

    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {
        "use_peft": _switched("adapter.lora_rank", USUAL_RANK),
        "load_in_8bit": _switched("adapter.base_precision", "int8"),
    }
    switches: ClassVar[dict[str, tuple[str, ...]]] = {"use_peft": ("lora_rank",)}

    @field_validator("lora_targets", mode="before")
    @classmethod
    def _everything(cls, targets: Any) -> Any:
        """all-linear as others write it."""
        return [ALL_LINEAR if name in ("all", "all_linear") else name for name in targets] if isinstance(targets, list) else targets

    @model_validator(mode="after")
    def _sound(self) -> AdapterSettings:
        if not self.lora_targets:
            raise ValueError("lora_targets is empty; use all-linear, or names of linear layers")
        return self

    @classmethod
    def of(cls, config: dict[str, Any]) -> AdapterSettings | None:
        """Of a stored configuration's tables; None where no adapters were trained."""
        made = cls(**config.get("adapter", {}))
        return made if made.lora_rank is not None else None
