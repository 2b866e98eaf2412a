"""`treadle data show` and `stats` of conversations and preferences: what is learnt and what is not, token by token and in numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from treadle.data.base import DATASETS
from treadle.data.conversations import Conversations
from treadle.data.dataset import splits_of
from treadle.data.documents import Record
from treadle.data.prepare import is_prepared
from treadle.data.settings import TEXT
from treadle.data.shards import Row
from treadle.data.sources import open_source
from treadle.data.summary import settings
from treadle.data.viewing import picture
from treadle.errors import ConfigError, DataError, InputError
from treadle.terminal import visible
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings

LEARNT, PLAIN = "\x1b[32m", "\x1b[0m"
OF_PREFERENCES, OF_CONVERSATIONS = {"chosen", "rejected"}, ({"messages"}, {"conversations"}, {"prompt", "completion"})


def kind_of_rows(path: str, text_column: str) -> str:
    """The data.dataset_class that the first row of a file is of."""
    try:
        if is_prepared(path):
            return TEXT
        source = open_source(path, text_column)
        source.whole_rows = True
        first = next((row for piece in source.pieces() for row in source.read(piece) if isinstance(row, Record)), None)
    except InputError:  # said by whoever reads it as what it is
        return TEXT
    have = set(first.table) if first is not None else set()
    if OF_PREFERENCES <= have:
        return "preferences"
    return "conversations" if text_column not in have and any(columns <= have for columns in OF_CONVERSATIONS) else TEXT


def opened(path: str, kind: str, tokenizer: str, **keys: Any) -> dict[str, Conversations]:
    """The splits of a file of conversations or preferences. keys: of [data]. ConfigError for any other kind."""
    made = DATASETS.get(kind)
    if not issubclass(made, Conversations):
        raise ConfigError(f"--dataset {kind}: choose conversations, preferences or text")
    wanted = settings(path, dataset_class=kind, **keys)
    return cast(dict[str, Conversations], splits_of(wanted, TokenizerSettings(name=tokenizer)))


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What tokens stand for, control tokens by their spelling."""
    names = {index: token for token, index in tokenizer.control_tokens.items()}
    runs = itertools.groupby(ids, key=lambda token: token in names)
    return "".join("".join(names[token] for token in run) if control else tokenizer.decode(run) for control, run in runs)


def show_rows(path: str, kind: str, first: int, count: int, tokenizer: str, colour: bool, **keys: Any) -> Iterator[str]:
    """Rows `first` to `first + count` of what is trained on: of each document its tokens in runs, with whether they are learnt.
    ConfigError for a row that is not there."""
    data = opened(path, kind, tokenizer, **keys)["train"]
    (rows,) = data.parts
    if first >= len(rows):
        raise ConfigError(f"--row {first}: there are rows 0 to {len(rows) - 1}")
    for number in range(first, min(first + count, len(rows))):
        if count > 1:
            yield f"row {number}"
        yield from _row(rows.row(number), data.tokenizer, data.seq_len, colour)


def _row(row: Row, tokenizer: Tokenizer, seq_len: int, colour: bool) -> Iterator[str]:
    for number, (start, length) in enumerate(zip(row.start.tolist(), row.length.tolist())):
        ids, learnt = row.shard.ids[start : start + length].tolist(), np.asarray(row.shard.learnt[start : start + length], dtype=bool)
        yield f"document {number}: {length} tokens, {int(learnt.sum())} of them learnt"
        for wanted, run in itertools.groupby(range(length), key=lambda place: bool(learnt[place])):
            text = visible(repr(spelled(tokenizer, [ids[place] for place in run])))
            yield f"    learnt  {LEARNT}{text}{PLAIN}" if wanted and colour else f"    {'learnt' if wanted else '':<8}{text}"
    used = int(row.length.sum())
    if used < seq_len:
        yield f"padding: {seq_len - used} positions"


def check(path: str, kind: str, tokenizer: str, **keys: Any) -> list[str]:
    """Reads all that was prepared of a file once more: checksums, and that the rows hold every document once. DataError where not."""
    lines = []
    for name, data in opened(path, kind, tokenizer, **keys).items():
        for tokens, rows in zip(data.sets, data.parts):
            tokens.verify()
            parts = [rows.row(number) for number in range(len(rows))]
            if (sum(len(row.start) for row in parts), sum(int(row.length.sum()) for row in parts)) != (tokens.documents(), tokens.tokens()):
                raise DataError(f"{tokens.folder}: the rows do not hold every document once; prepare the data again")
        lines.append(f"{name}: right: {data.describe()}; checksums hold, and every document is in one row once")
    return lines


def statistics(path: str, kind: str, tokenizer: str, **keys: Any) -> list[str]:
    """Counts of each split, what was left out or changed and why, and lengths as a picture."""
    splits = opened(path, kind, tokenizer, **keys)
    data = splits["train"]
    lines = [f"tokenizer: {data.tokenizer.kind}, {data.tokenizer.vocab_size} tokens"]
    lines += [f"{name}: {split.describe()}" for name, split in splits.items()]
    stats = data.stats()
    lines.append(f"learnt: {stats['learnt'] / max(1, stats['tokens']):.1%} of the tokens; rows are {stats['packing_efficiency']:.1%} filled; "
                 f"malformed: {stats['malformed']}")  # fmt: skip
    lines += [f"    malformed: {place}" for tokens in data.sets for place in tokens.statistics["malformed_first"]]
    lengths = [np.diff(np.append(shard.document_starts, len(shard.ids))) for tokens in data.sets for shard in tokens.shards]
    return [*lines, *picture(np.concatenate(lengths))]
