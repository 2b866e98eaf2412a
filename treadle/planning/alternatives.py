"""What to change where a plan does not fit: each change is planned too, so that what is advised fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from treadle.errors import ConfigError
from treadle.training.config import Recipe

MOST_PROCESSES = 8  # times those that were asked for

Needs = Callable[[Recipe, int], float]  # bytes of one process under a recipe, on so many processes
Way = tuple[list[tuple[str, object]], int]  # dotted keys with their values, and the processes


def alternatives(recipe: Recipe, result: dict[str, Any], limit: float, needs: Needs) -> list[str]:
    """Flags to type, each entry enough by itself to bring a process of the planned `result` below `limit` bytes; the least change of
    its kind. What generates keeps nothing for a backward pass and is one process, so only its batch and length help."""
    rows, world = result["per_device_train_batch_size"], result["world"]
    shards: list[tuple[str, object]] = [("parallel.mode", "fsdp")]
    if result["mode"] == "fsdp":
        recipe, shards = _changed(recipe, (shards, world)), []  # what `auto` came to, it comes to again

    def fits(way: Way) -> bool:
        try:
            return needs(_changed(recipe, way), way[1]) <= limit
        except ConfigError:  # does not go with something that was asked for
            return False

    def first(ways: Iterator[Way]) -> Way | None:
        return next(filter(fits, ways), None)

    smaller = first(_halved("train.per_device_train_batch_size", rows, world))
    if "inference" in result:
        kinds = [smaller, first(_halved("data.seq_len", result["seq_len"], 1))]
        found = [way for way in kinds if way is not None]
        return [_typed(way, world) for way in found]
    again: list[tuple[str, object]] = [("train.gradient_checkpointing", True)] if result["gradient_checkpointing"] is not True else []
    kinds = [smaller, first(iter([(again, world)] if again else []))]
    if not any(kinds) and again and rows > 1:
        kinds.append(first((again + keys, world) for keys, _ in _halved("train.per_device_train_batch_size", rows, world)))
    counts = [world * 2**n for n in range(MOST_PROCESSES.bit_length()) if world * 2**n > 1 and (shards or n)]
    if "fsdp" in result["layouts"]:
        kinds.append(first((shards, count) for count in counts))
    return [_typed(way, world) for way in kinds if way is not None]


def _halved(key: str, number: int, world: int) -> Iterator[Way]:
    while number > 1:
        number //= 2
        yield [(key, number)], world


def _changed(recipe: Recipe, way: Way) -> Recipe:
    """The recipe with these keys."""
    for key, value in way[0]:
        section, _, name = key.partition(".")
        changed: dict[str, Any] = {section: recipe.section(section).model_copy(update={name: value})}
        recipe = replace(recipe, **changed)
    return recipe


def _typed(way: Way, world: int) -> str:
    """As flags, by the names that people type."""
    words = [f"--world {way[1]}"] if way[1] != world else []
    short = {"train.per_device_train_batch_size": "batch_size", "parallel.mode": "parallel"}
    words += [f"--{short.get(key, key.partition('.')[2])} {str(value).lower()}" for key, value in way[0]]
    return " ".join(words)
