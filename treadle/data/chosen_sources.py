"""What a [data] section names: its sources, and the shares of them that are held out."""

from __future__ import annotations

from treadle.data.settings import DataSettings
from treadle.data.sources import HuggingFaceSource, Source, open_source
from treadle.data.transformed import transformed
from treadle.data.user_functions import transforms_of
from treadle.errors import InputError


def sources_of(settings: DataSettings) -> list[Source]:
    """The sources a [data] section names, behind its transforms."""
    return transformed(opened_sources(settings), transforms_of(settings), settings.cache_dir)


def opened_sources(settings: DataSettings) -> list[Source]:
    """The sources a [data] section names, as they are."""
    limit = settings.max_samples
    if settings.dataset_name is not None:
        return [HuggingFaceSource(settings.dataset_name, settings.dataset_config, settings.split, settings.text_column, limit)]
    if settings.path is None:
        raise InputError("no data: give a text file (`treadle train FILE.txt`), --data.path or --data.dataset_name")
    paths = settings.path if isinstance(settings.path, list) else [settings.path]
    return [open_source(path, settings.text_column, settings.document_separator, limit) for path in paths]


def held_shares(settings: DataSettings) -> tuple[float, float]:
    """Shares held out for validation and for a test; a text of its own to validate on leaves all but the test's."""
    elsewhere = settings.validation_path is not None or settings.validation_split is not None
    return 0.0 if elsewhere else settings.validation_fraction, settings.test_fraction
