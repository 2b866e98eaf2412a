"""Prepared token sets, a packing and an order, seen as numbered batches: text as training and evaluation read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from treadle import trusted_code
from treadle.data.base import DATASETS, BatchPlan, BatchSequence, Dataset, IndexedDataset, Position
from treadle.data.chosen_sources import held_shares, part_cache, prepared, sources_of, validation_source
from treadle.data.encoding import scored_bytes
from treadle.data.order import Order, step_draws
from treadle.data.prepare import Progress, is_prepared, open_prepared, tokenizer_for
from treadle.data.settings import TEXT, DataSettings
from treadle.data.shards import Rows, TokenSet
from treadle.data.sources import Source
from treadle.data.stream_splits import stream_splits
from treadle.data.transformed import Shaped
from treadle.data.user_functions import transforms_of
from treadle.errors import ConfigError, InputError
from treadle.files import cache_root
from treadle.storage.remote import AnyPath, local_copy, path_of
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings

if TYPE_CHECKING:
    from treadle.data.batch import Batch


class TokenDataset(IndexedDataset):
    """Rows of `seq_len` tokens from one or more token sets, in a keyed order."""

    tokenizer: Tokenizer
    rows_class: ClassVar[type[Rows]] = Rows

    def __init__(
        self,
        sets: Sequence[TokenSet],
        tokenizer: Tokenizer,
        seq_len: int,
        packing: str = "concat",
        weights: Sequence[Any] | None = None,
        shuffle: bool = True,
        names: Sequence[str] = (),
        shaped_by: Shaped | None = None,
    ) -> None:
        self.sets = list(sets)
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.packing = packing
        self.weights = tuple(weights) if weights is not None else None
        self.shuffle = shuffle
        self.names = list(names) or [f"source {n + 1}" for n in range(len(self.sets))]
        self._epochs: list[int] | None = None  # of each source, as told last
        self.shaped_by = shaped_by or Shaped()
        for tokens in self.sets:
            if tokens.vocab_size > tokenizer.vocab_size:
                raise ConfigError(f"the data has {tokens.vocab_size} tokens, the tokenizer {tokenizer.vocab_size}")
        self._byte_lengths = scored_bytes(tokenizer)
        self.parts = [self.rows_class(tokens, packing, seq_len) for tokens in self.sets]
        if len(self) == 0:
            raise InputError("the data holds no row to train on")
        self.shaped_by.keep(self.fingerprint())

    @staticmethod
    def load(
        path: str | Path | Sequence[str],
        tokenizer: Tokenizer | str = "auto",
        seq_len: int = 256,
        split: str = "train",
        **options: Any,
    ) -> Dataset:
        """The rows of a file or folder; prepared (and cached) on first use. `options` are keys of [data], or other
        words for them. InputError when it has no such split."""
        options = DataSettings.in_our_words(options)
        trusted_code.allow_names([options.get("transforms"), options.get("filters")])  # who passes a name from Python means that
        paths = [str(p) for p in path] if isinstance(path, (list, tuple)) else str(path)
        settings = DataSettings(**{"path": paths, "seq_len": seq_len, **options})
        name = tokenizer if isinstance(tokenizer, str) else "auto"
        given = tokenizer if isinstance(tokenizer, Tokenizer) else None
        splits = splits_of(settings, TokenizerSettings(name=name), tokenizer=given)
        if split not in splits:
            raise InputError(f"{path} has no {split} split (there is: {', '.join(splits)})")
        return splits[split]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def rows_per_epoch(self) -> int:
        return len(self)

    def order(self, seed: int, end: int | None = None, global_batch: int = 1) -> Order:
        """The order training draws rows in."""
        return Order(tuple(len(part) for part in self.parts), seed, self.shuffle, self.weights, end, global_batch)

    def step_reader(self, position: int, plan: BatchPlan) -> Callable[[int], list[Batch]]:
        end = None if plan.rows is None else position * plan.global_batch_size + plan.rows
        order = self.order(plan.seed, end, plan.global_batch_size)

        def read(step: int) -> list[Batch]:
            source, row = order.draws(step_draws(step, plan.global_batch_size, plan.rank, plan.world_size))
            micro = len(row) // plan.accumulation
            return [self.batch(source[i : i + micro], row[i : i + micro]) for i in range(0, len(row), micro)]

        return read

    def news(self, position: Position, plan: BatchPlan) -> list[str]:
        """Where sources have weights: which of them begins another epoch."""
        if self.weights is None:
            return []
        counts = self.order(plan.seed, None, plan.global_batch_size).mixture.counts(position * plan.global_batch_size)
        epochs = [(int(count) - 1) // len(part) if count else 0 for count, part in zip(counts, self.parts)]
        before, self._epochs = self._epochs or epochs, epochs
        return [f"{self.names[n]}: epoch {now + 1} begins"
                for n, (was, now) in enumerate(zip(before, epochs)) if now > was]  # fmt: skip

    def rows_of(self, position: Position, plan: BatchPlan) -> list[tuple[int, int]]:
        """(source, row) of each sample; row -1 is padding."""
        end = None if plan.rows is None else position * plan.global_batch_size + plan.rows
        draws = step_draws(position, plan.global_batch_size, plan.rank, plan.world_size)
        source, row = self.order(plan.seed, end, plan.global_batch_size).draws(draws)
        return list(zip(source.tolist(), row.tolist()))

    def batch(self, source: np.ndarray, row: np.ndarray) -> Batch:
        """The rows (source [B], row [B]) as a batch; row -1 is padding."""
        from treadle.data.batch import collate_text  # torch: only here, so that `treadle data` starts without it

        rows = [self.parts[s].row(r) if r >= 0 else None for s, r in zip(source.tolist(), row.tolist())]
        return collate_text(rows, self.seq_len, self._byte_lengths)

    def in_sequence(self, batch_size: int, limit: int | None = None) -> Sequence[Batch]:
        """All rows once, as they stand; `limit` rows spread evenly when there are more."""
        numbers = np.arange(len(self))
        if limit is not None and limit < len(numbers):
            numbers = np.unique(np.linspace(0, len(self) - 1, limit).astype(np.int64))
        starts = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])
        source = np.searchsorted(starts, numbers, side="right") - 1
        row = numbers - starts[source]
        parts = [slice(i, i + batch_size) for i in range(0, len(numbers), batch_size)]
        return BatchSequence(lambda part: self.batch(source[part], row[part]), parts)

    def fingerprint(self) -> str:
        """Equal for equal tokens, packing and row length, wherever the files are."""
        described: list[Any] = [[t.fingerprint for t in self.sets], self.packing, self.seq_len, self.weights, self.shuffle]
        described += [list(self.shaped_by.functions.values())] if self.shaped_by.functions else []
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def difference(self, fingerprint: str) -> str:
        return self.shaped_by.difference(fingerprint)

    def without_fingerprint(self) -> list[str]:
        return self.shaped_by.unknown

    def describe(self) -> str:
        stats = self.stats()
        return (f"{stats['documents']} document(s), {stats['bytes']:,} bytes, {stats['tokens']:,} tokens, "
                f"{stats['rows']:,} rows of {stats['row_length']}" + self.shaped_by.remark())  # fmt: skip

    def stats(self) -> dict[str, Any]:
        """Documents, bytes, tokens, rows, length percentiles, and the share of positions that hold a token."""
        tokens = sum(t.tokens() for t in self.sets)
        size = sum(t.statistics["bytes"] for t in self.sets)
        return {
            "documents": sum(t.documents() for t in self.sets),
            "bytes": size,
            "tokens": tokens,
            "bytes_per_token": round(size / max(1, tokens), 4),
            "rows": len(self),
            "row_length": self.seq_len,
            "packing": self.packing,
            "packing_efficiency": round(tokens / max(1, len(self) * self.seq_len), 4),
            "length_percentiles": [t.statistics["length_percentiles"] for t in self.sets],
            "malformed": sum(t.statistics["malformed"] for t in self.sets),
        }


def _prepared_tokenizer(folder: AnyPath, asked: str, root: Path) -> Tokenizer:
    """The tokenizer of prepared text; ConfigError where bytes are asked for (or implied by the architecture) and it has others."""
    tokenizer = Tokenizer.load(local_copy(folder / "tokenizer", root))
    if asked.lower() == "byte" != tokenizer.kind:
        raise ConfigError(f"{folder} was prepared with a {tokenizer.kind} tokenizer and tokenizer.name = {asked}; prepare it again "
                          f"(treadle data prepare FILE --tokenizer {asked}), or take its own: --tokenizer.name auto")  # fmt: skip
    return tokenizer


def splits_of(
    settings: DataSettings,
    tokenizer_settings: TokenizerSettings,
    task: Any = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    sources: list[Source] | None = None,
) -> dict[str, Dataset]:
    """The train, validation and test datasets of a configuration, of whatever kind data.dataset names. sources: read in place of
    those that the configuration names."""
    if settings.dataset_class == TEXT and settings.streaming:
        return stream_splits(settings, tokenizer_settings, tokenizer, progress, sources)
    if settings.dataset_class == TEXT:
        return dict(load_splits(settings, tokenizer_settings, tokenizer, progress, sources=sources))
    return DATASETS.get(settings.dataset_class).splits_with(settings, task, seed, tokenizer_settings, tokenizer, progress)


def load_splits(
    settings: DataSettings,
    tokenizer_settings: TokenizerSettings,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    sources: list[Source] | None = None,
) -> dict[str, TokenDataset]:
    """The train and (where something is held out) validation rows that the configuration asks for. ConfigError where
    prepared tokens do not fit what is asked."""
    root = cache_root(settings.cache_dir)
    held_out = held_shares(settings)

    if sources is None and isinstance(settings.path, str) and is_prepared(settings.path):
        if transforms_of(settings):
            raise ConfigError(f"{settings.path} holds tokens, which transforms and filters cannot read; prepare the text with them: "
                              "treadle train --data.path FILE")  # fmt: skip
        folder = path_of(settings.path, part_cache(settings))
        sets = [open_prepared(folder)]
        tokenizer = tokenizer or _prepared_tokenizer(folder, tokenizer_settings.name, root)
    else:
        sources = sources or sources_of(settings)
        tokenizer = tokenizer or tokenizer_for(
            sources[0], tokenizer_settings.name, tokenizer_settings.vocab_size, root=root, held=held_out,
            limit=tokenizer_settings.train_bytes,
        )  # fmt: skip
        sets = [prepared(settings, source, tokenizer, held_out, progress, fresh) for source in sources]
    for one in sets:
        if one["train"].described["tokenizer"] != tokenizer.fingerprint():
            raise ConfigError(f"{settings.path} was prepared with another tokenizer; prepare it again")
    held = [one["validation"] for one in sets if "validation" in one]
    if (other := validation_source(settings, sources or [])) is not None:
        held = [prepared(settings, other, tokenizer, progress=progress, fresh=fresh)["train"]]
    shaped = Shaped.of(sources or [], root)

    def rows(sets: list[TokenSet], weights: list[Any] | None, names: Sequence[str] = ()) -> TokenDataset:
        return TokenDataset(sets, tokenizer, settings.seq_len, settings.packing, weights, settings.shuffle, names, shaped)

    splits = {"train": rows([one["train"] for one in sets], settings.weights, settings.path if isinstance(settings.path, list) else ())}
    for name, some in (("validation", held), ("test", [one["test"] for one in sets if "test" in one])):
        if some:
            splits[name] = rows(some, None)
    return splits
