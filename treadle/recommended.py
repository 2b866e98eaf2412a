"""Which of the training values that a preset recommends go with what else is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADAMW_ALONE = {"parallel.mode": "deepspeed", "parallel.shard_optimizer": True}  # what no other optimiser takes


def fitting(recommended: Mapping[str, Any], asked: Mapping[str, Any], trained: bool = False) -> set[str]:
    """The dotted keys of `recommended` that hold. Where an optimiser is among them, its values were measured with it and from random
    weights: all of optim.* goes where another optimiser is asked for, where something takes AdamW alone, for a student of a teacher, and
    for `trained` weights. asked: dotted keys that files and flags give, with their values."""
    optimizer = recommended.get("optim.name")
    if optimizer is None or not (trained or _another(optimizer, asked)):
        return set(recommended)
    return {key for key in recommended if not key.startswith("optim.")}


def _another(optimizer: str, asked: Mapping[str, Any]) -> bool:
    named = str(asked.get("optim.name", optimizer)).lower()
    of_adamw = any(str(asked.get(key)).lower() == str(value).lower() for key, value in ADAMW_ALONE.items())
    elsewhere = any(str(asked.get(key)).lower() not in ("none", "null") for key in ("parallel.deepspeed", "distill.teacher"))
    return named != optimizer or of_adamw or elsewhere
