"""The transforms that a [data] section names: FILE.py:FUNCTION, which trusted_code.py may refuse, and the ready ones."""

from __future__ import annotations

import inspect

from treadle import trusted_code
from treadle.data.deduplication import ExactDeduplication, NearDeduplication
from treadle.data.settings import DataSettings
from treadle.data.transforms import Filter, FunctionTransform, Map, MaximumLength, MinimumLength, Transform
from treadle.errors import ConfigError


def transforms_of(settings: DataSettings) -> list[Transform]:
    """In order: data.transforms, the limits of length, data.filters, de-duplication."""
    made: list[Transform] = [named_transform(name, "transforms") for name in settings.transforms]
    if settings.minimum_characters is not None:
        made.append(MinimumLength(settings.minimum_characters))
    if settings.maximum_characters is not None:
        made.append(MaximumLength(settings.maximum_characters))
    made += [named_transform(name, "filters", Filter) for name in settings.filters]
    if settings.deduplicate != "none":
        made.append(ExactDeduplication() if settings.deduplicate == "exact" else NearDeduplication())
    return made


def named_transform(name: str, key: str, kind: type[FunctionTransform] = Map) -> FunctionTransform:
    """FILE.py:FUNCTION of a [data] key as a transform of this kind; ConfigError when it is no function of one text."""
    if not trusted_code.is_place(name):
        raise ConfigError(f"data.{key} = {name!r}: give FILE.py:FUNCTION")
    function = trusted_code.load(name, f"data.{key}")
    if not callable(function) or inspect.isclass(function):
        raise ConfigError(f"data.{key} = {name!r} is a {type(function).__name__}; wanted is a function of one text")
    return kind(function)
