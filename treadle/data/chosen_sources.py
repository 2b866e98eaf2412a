"""What a [data] section names: its sources, what of them is held out, and how they are prepared."""

from __future__ import annotations

from pathlib import Path

from treadle.data.huggingface_source import HuggingFaceSource
from treadle.data.prepare import Held, Progress, prepare
from treadle.data.settings import DataSettings
from treadle.data.shards import TokenSet
from treadle.data.sources import Source, open_source
from treadle.data.transformed import as_those, transformed
from treadle.data.user_functions import transforms_of
from treadle.errors import InputError
from treadle.files import cache_root
from treadle.storage.cache import PartCache
from treadle.text.base import Tokenizer


def sources_of(settings: DataSettings) -> list[Source]:
    """The sources a [data] section names, behind its transforms."""
    return transformed(opened_sources(settings), transforms_of(settings), settings.cache_dir)


def opened_sources(settings: DataSettings) -> list[Source]:
    """The sources a [data] section names, as they are. InputError when it names none."""
    limit = settings.max_samples
    if settings.dataset_name is not None:
        return [HuggingFaceSource(settings.dataset_name, settings.dataset_config, settings.split, settings.text_column, limit)]
    if settings.path is None:
        raise InputError("no data: give a text file (`treadle train FILE.txt`), --data.path or --data.dataset_name")
    paths = settings.path if isinstance(settings.path, list) else [settings.path]
    return [open_source(path, settings.text_column, settings.document_separator, limit, part_cache(settings)) for path in paths]


def part_cache(settings: DataSettings) -> PartCache:
    """Where what is read from URLs is kept."""
    return PartCache.under(settings.cache_dir, int(settings.remote_cache_gb * 1e9))


def held_shares(settings: DataSettings) -> Held:
    """Shares held out for validation and for a test; a text of its own to validate on leaves all but the test's."""
    elsewhere = settings.validation_path is not None or settings.validation_split is not None
    return 0.0 if elsewhere else settings.validation_fraction, settings.test_fraction


def validation_source(settings: DataSettings, trained_on: list[Source]) -> Source | None:
    """The text of its own to validate on, where one is named, behind the transforms of what is trained on."""
    if settings.validation_path is not None:
        return as_those(trained_on, open_source(settings.validation_path, settings.text_column, settings.document_separator, cache=part_cache(settings)))
    if settings.validation_split is not None and settings.dataset_name is not None:
        other = HuggingFaceSource(settings.dataset_name, settings.dataset_config, settings.validation_split, settings.text_column)
        return as_those(trained_on, other)
    return None


def prepared(
    settings: DataSettings, source: Source, tokenizer: Tokenizer, held: Held = (0.0, 0.0), progress: Progress | None = None,
    fresh: bool = False, output: Path | None = None,
) -> dict[str, TokenSet]:  # fmt: skip
    """`prepare` as the section says."""
    return prepare(
        source, tokenizer, root=cache_root(settings.cache_dir), held=held, min_length=settings.min_length, on_bad=settings.on_bad,
        bad_limit=settings.bad_limit, workers=settings.preparation_workers, progress=progress, fresh=fresh, output=output,
    )  # fmt: skip
