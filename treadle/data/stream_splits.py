"""The splits of a configuration with data.streaming: a stream to train on, and blocks of it that are held out."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from treadle.data.base import DATASETS, Dataset
from treadle.data.chosen_sources import held_shares, prepared, sources_of, validation_source
from treadle.data.compressed import content_size
from treadle.data.order import key, permute
from treadle.data.prepare import Progress, is_prepared, tokenizer_for
from treadle.data.settings import TEXT, DataSettings
from treadle.data.sources import Piece, Source, WrappedSource
from treadle.data.streaming import Stream, StreamDataset, block_bytes
from treadle.data.transformed import Shaped
from treadle.errors import ConfigError
from treadle.files import cache_root
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings

MOST_HELD_OUT = 4 << 20  # bytes for each split: what is held out is tokenised before the first step


class ChosenPieces(WrappedSource):
    """Some of another source's pieces."""

    def __init__(self, source: Source, chosen: list[Piece]) -> None:
        super().__init__(source)
        self.chosen = chosen

    def identity(self) -> str:
        """A hash of the source inside and of the pieces."""
        described = [self.source.identity(), [[*p.files, p.start, p.stop, p.part, p.parts] for p in self.chosen]]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def pieces(self) -> list[Piece]:
        """Those chosen."""
        return self.chosen


def divided(source: Source, shares: tuple[float, float], piece_bytes: int) -> tuple[list[Piece], list[Piece], list[Piece]]:
    """The pieces to train on, to validate on and to test on: whole blocks, chosen by a key that no seed changes, a few MB each."""
    pieces = source.pieces()
    most = max(1, MOST_HELD_OUT // piece_bytes)
    counts = [min(most, max(1, round(share * len(pieces)))) if share else 0 for share in shares]
    drawn = permute(np.arange(min(len(pieces), sum(counts))), len(pieces), key(0x4E1D)).tolist() if len(pieces) > sum(counts) else []
    validation, test = drawn[: counts[0]], drawn[counts[0] :]
    held = set(drawn)
    return [p for n, p in enumerate(pieces) if n not in held], [pieces[n] for n in validation], [pieces[n] for n in test]


def stream_splits(
    settings: DataSettings, tokenizer_settings: TokenizerSettings, tokenizer: Tokenizer | None = None, progress: Progress | None = None,
    given: list[Source] | None = None,
) -> dict[str, Dataset]:  # fmt: skip
    """The stream to train on, and the held-out text, prepared, where there is some. given: read in place of what the settings name.
    ConfigError for a folder that is prepared already."""
    paths = settings.path if isinstance(settings.path, list) else [settings.path]
    for path in paths:
        if path is not None and is_prepared(path):
            raise ConfigError(f"{path} is prepared already, which is faster than a stream; leave --data.streaming away")
    root, sources = cache_root(settings.cache_dir), given or sources_of(settings)
    for source in sources:  # all of them before the first is cut: duplicates are looked for in every one
        size = sum(content_size(file) for file in source.files) if source.files else source.size()
        source.piece_bytes = block_bytes(settings.seq_len, size)
    parts = [divided(source, held_shares(settings), source.piece_bytes) for source in sources]
    tokenizer = tokenizer or tokenizer_for(
        ChosenPieces(sources[0], parts[0][0]), tokenizer_settings.name, tokenizer_settings.vocab_size, root=root, held=(0.0, 0.0),
        limit=tokenizer_settings.train_bytes,
    )  # fmt: skip
    for source in sources:
        source.ended_by(tokenizer.eos_id)
    names = [str(path) for path in paths] if settings.path is not None else [str(settings.dataset_name or "the data")] * len(sources)
    streams = [Stream(name, [(source, piece) for piece in train]) for name, source, (train, _, _) in zip(names, sources, parts)]
    if settings.weights is None and len(streams) > 1:  # one set of blocks, drawn in proportion to size
        streams = [Stream(", ".join(names), [piece for stream in streams for piece in stream.pieces])]
    splits: dict[str, Dataset] = {
        "train": StreamDataset(streams, tokenizer, settings.seq_len, settings.packing, settings.weights, settings.shuffle,
                               settings.min_length, settings.on_bad, settings.bad_limit, settings.cache_dir, Shaped.of(sources, root))
    }  # fmt: skip
    held: dict[str, list[Source]] = {
        "validation": [ChosenPieces(source, chosen) for source, (_, chosen, _) in zip(sources, parts) if chosen],
        "test": [ChosenPieces(source, chosen) for source, (_, _, chosen) in zip(sources, parts) if chosen],
    }
    if (other := validation_source(settings, sources)) is not None:
        held["validation"] = [other]
    for name, some in held.items():
        sets = [prepared(settings, source, tokenizer, progress=progress)["train"] for source in some]
        if sets:
            splits[name] = DATASETS.get(TEXT)(sets, tokenizer, settings.seq_len, settings.packing, None, settings.shuffle)
    return splits
