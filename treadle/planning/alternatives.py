"""What to change where a plan does not fit: each change is planned too, so that what is advised fits."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from treadle.errors import ConfigError
from treadle.training.config import Recipe

MOST_PROCESSES = 8  # times those that were asked for
MODE, ROWS, ACCUMULATION, LENGTH = "parallel.mode", "train.per_device_train_batch_size", "train.gradient_accumulation_steps", "data.seq_len"
CHECKPOINTING = "train.gradient_checkpointing"
SHORT = {ROWS: "batch_size", MODE: "parallel"}  # as people type them

Way = dict[str, object]  # dotted keys with their values; beside them "world" and "weights"
Needs = Callable[[Recipe, int, str], float]  # bytes of one process under a recipe, on so many processes, with weights in a format


def alternatives(recipe: Recipe, result: dict[str, Any], limit: float, needs: Needs) -> list[str]:
    """Flags to type, each entry enough by itself to bring a process of the planned `result` below `limit` bytes; the least change of
    its kind. What generates keeps nothing for a backward pass and is one process, so only its batch, length and format help."""
    rows, world, weights = result["per_device_train_batch_size"], result["world"], result.get("weights", "fp32")
    if recipe.parallel.mode == "auto" and result["mode"] in ("ddp", "fsdp"):
        recipe = _changed(recipe, {MODE: result["mode"]})  # what `auto` came to, it comes to again

    def fits(way: Way) -> bool:
        try:
            return needs(_changed(recipe, way), int(str(way.get("world", world))), str(way.get("weights", weights))) <= limit
        except ConfigError:  # does not go with something that was asked for
            return False

    def least(ways: Sequence[Way]) -> list[Way]:
        """The first that fits, of ways that each take less than the one before."""
        if not ways or not fits(ways[-1]):
            return []
        return [ways[bisect.bisect_left(range(len(ways) - 1), True, key=lambda number: fits(ways[number]))]]

    fewer: list[Way] = [_in_step(recipe, n, world) for n in _halves(rows)]
    found = least(fewer)
    if "inference" in result:
        found += least([{LENGTH: n} for n in _halves(result["seq_len"])])
        found += least([{"weights": "fp32"}] if weights != "fp32" else [])  # beside fp32 weights there is less in fp32
        return [_typed(way) for way in found]
    if result["gradient_checkpointing"] is not True:
        found += least([{CHECKPOINTING: True}])
        found = found or least([{CHECKPOINTING: True, **way} for way in fewer])
    if "fsdp" in result["layouts"] and recipe.optim.name != "soap":  # which needs whole matrices
        shards: Way = {} if result["mode"] == "fsdp" else {MODE: "fsdp"}
        counts = [world * 2**n for n in range(MOST_PROCESSES.bit_length()) if world * 2**n > 1 and (shards or n)]
        found += least([{**({"world": count} if count != world else {}), **shards, **_in_step(recipe, rows, count, changed=False)} for count in counts])
    return [_typed(way) for way in found]


def _halves(number: int) -> list[int]:
    found = []
    while number > 1:
        number //= 2
        found.append(number)
    return found


def _in_step(recipe: Recipe, rows: int, world: int, changed: bool = True) -> Way:
    """So many rows at once. Where a step's rows and its passes are both given, the passes follow."""
    way: Way = {ROWS: rows} if changed else {}
    total = recipe.train.global_batch_size
    if total is not None and recipe.train.gradient_accumulation_steps is not None and total % (rows * world) == 0:
        way[ACCUMULATION] = total // (rows * world)
    return way


def _changed(recipe: Recipe, way: Way) -> Recipe:
    """The recipe with these keys."""
    for key, value in way.items():
        section, _, name = key.partition(".")
        if name:
            changed: dict[str, Any] = {section: recipe.section(section).model_copy(update={name: value})}
            recipe = replace(recipe, **changed)
    return recipe


def _typed(way: Way) -> str:
    """As flags, by the names that people type."""
    return " ".join(f"--{SHORT.get(key, key.rpartition('.')[2])} {str(value).lower()}" for key, value in way.items())
