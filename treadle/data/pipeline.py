"""treadle.DataPipeline and StreamingDataset: text from anywhere, through functions of the user's, as a dataset."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from treadle import trusted_code
from treadle.data.base import Dataset
from treadle.data.chosen_sources import opened_sources
from treadle.data.dataset import splits_of
from treadle.data.generated_texts import generated_texts
from treadle.data.settings import DataSettings
from treadle.data.sources import Source
from treadle.data.transformed import transformed
from treadle.data.transforms import Filter, Map, Transform
from treadle.data.user_functions import named_transform, transforms_of
from treadle.errors import ConfigError, InputError
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings


def DataPipeline(
    source: Any,
    tokenizer: Tokenizer | str = "auto",
    transforms: Sequence[Transform | Callable[..., Any] | str] = (),
    *,
    seq_len: int = 256,
    streaming: bool = False,
    split: str = "train",
    version: str | int | None = None,
    **keys: Any,
) -> Dataset:
    """The rows of texts that went through `transforms`, in order.

    source: a file or folder, a list of them, a treadle.data.sources.Source (or a list), or a function that returns an iterator of texts
    (`version` then stands for it in the place of its source). transforms: Map, Filter and the other transforms; a plain function is
    a Map, or a Filter where it is annotated `-> bool`; so is FILE.py:FUNCTION. keys: keys of [data], or other words for them.
    InputError without such a split; ConfigError for weights of anything but paths.
    """
    keys = DataSettings.in_our_words(keys)
    trusted_code.allow_names([keys, [t for t in transforms if isinstance(t, str)]])  # who passes a name means that
    steps = [_transform(one) for one in transforms]
    given = source if isinstance(source, (list, tuple)) else [source]
    path = None
    if all(isinstance(one, (str, Path)) for one in given):
        path = [str(one) for one in given] if isinstance(source, (list, tuple)) else str(source)
    settings = DataSettings(**{"path": path, "seq_len": seq_len, "streaming": streaming, **keys})
    opened: list[Source]
    if path is not None:
        opened = opened_sources(settings) if steps else []
    else:
        opened = [_opened(one, settings, version) for one in given]
        if settings.weights is not None:
            raise ConfigError("weights are of paths; give the texts as files, or one function that mixes them")
    sources = transformed(opened, [*steps, *transforms_of(settings)], settings.cache_dir, always=True) if opened else None
    name = tokenizer if isinstance(tokenizer, str) else "auto"
    whole = tokenizer if isinstance(tokenizer, Tokenizer) else None
    found = splits_of(settings, TokenizerSettings(name=name), tokenizer=whole, sources=sources)
    if split not in found:
        raise InputError(f"there is no {split} split (there is: {', '.join(found)}); data.validation_fraction and data.test_fraction hold "
                         "text out")  # fmt: skip
    return found[split]


def StreamingDataset(
    path: Any, tokenizer: Tokenizer | str = "auto", max_seq_len: int = 256, shuffle_buffer: int | None = None, **keys: Any
) -> Dataset:
    """Text of any size, read and tokenised while training; the words that other frameworks have for DataPipeline(streaming=True).

    path: what DataPipeline's source is. max_seq_len: tokens in a row. shuffle_buffer: 0 leaves rows in their order; any other number is
    taken and not needed, since an epoch permutes the whole text in blocks of 256 kB. keys: keys of [data]. ConfigError for a negative
    buffer, and whatever DataPipeline raises.
    """
    if shuffle_buffer is not None:
        if isinstance(shuffle_buffer, bool) or not isinstance(shuffle_buffer, int) or shuffle_buffer < 0:
            raise ConfigError(f"shuffle_buffer = {shuffle_buffer!r}: give 0 for rows in their order, or leave it out")
        keys.setdefault("shuffle", shuffle_buffer > 0)
    return DataPipeline(path, tokenizer, seq_len=max_seq_len, **{"streaming": True, **keys})


def _opened(one: Any, settings: DataSettings, version: str | int | None) -> Source:
    if isinstance(one, Source):
        return one
    if not callable(one):
        raise ConfigError(f"a source is a path, a Source, or a function that returns texts, not a {type(one).__name__}; for a list of texts: "
                          "DataPipeline(lambda: texts, ..., version=1)")  # fmt: skip
    return generated_texts(one, settings.streaming, version, settings.max_samples)


def _transform(one: Any) -> Transform:
    if isinstance(one, Transform):
        return one
    if isinstance(one, str):
        return named_transform(one, "transforms")
    if not inspect.isroutine(one):
        raise ConfigError(f"{one!r} is no transform: give a function, Map, Filter, BatchedMap or a ready one")
    return Filter(one) if getattr(one, "__annotations__", {}).get("return") in (bool, "bool") else Map(one)
