"""`treadle data show`, `stats` and `check`: rows as the model sees them, lengths as a picture, and proof that nothing was lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np

from treadle.data.documents import Bad
from treadle.data.packing import plan
from treadle.data.prepare import is_prepared
from treadle.data.settings import DataSettings, Packing
from treadle.data.shards import Row, Rows, TokenSet
from treadle.data.stream_splits import stream_splits
from treadle.data.streaming import StreamDataset, spread
from treadle.data.summary import described, opened, settings
from treadle.errors import ConfigError, DataError, InputError
from treadle.terminal import visible
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings

SAMPLED_BLOCKS = 64  # of a stream, spread evenly: statistics of all of it would read all of it
BAR = 40  # characters
MASKED, PLAIN = "\x1b[31m", "\x1b[0m"


def _stream(path: str, tokenizer: str, seq_len: int, packing: str = "concat", text_column: str = "text") -> StreamDataset:
    wanted = settings(path, streaming=True, seq_len=seq_len, packing=packing, validation_fraction=0.0, text_column=text_column)
    data = stream_splits(wanted, TokenizerSettings(name=tokenizer))["train"]
    assert isinstance(data, StreamDataset)
    return data


# ---- show ----


def show_rows(
    path: str, first: int, count: int, packing: str, tokenizer: str, seq_len: int, text_column: str, streaming: bool, colour: bool
) -> Iterator[str]:  # fmt: skip
    """Rows `first` to `first + count`; of a stream, in the order of a run with seed 0. ConfigError for a row that is
    not there."""
    if streaming:
        data = _stream(path, tokenizer, seq_len, packing, text_column)
        made = data.tokenizer
        rows: Iterator[Row] = itertools.islice(data.rows_in_order(), first, first + count)
    else:
        wanted = settings(path, packing=packing, seq_len=seq_len, text_column=text_column)
        made, sets = opened(wanted, tokenizer, 2048)
        all_rows = Rows(sets["train"], wanted.packing, seq_len)
        if first >= len(all_rows):
            raise ConfigError(f"--row {first}: there are rows 0 to {len(all_rows) - 1}")
        rows = (all_rows.row(n) for n in range(first, min(first + count, len(all_rows))))
    for number, row in enumerate(rows, first):
        if count > 1:
            yield f"row {number}"
        yield from _row(row, made, seq_len, colour)


def _row(row: Row, made: Tokenizer, seq_len: int, colour: bool) -> Iterator[str]:
    if not len(row.start):
        raise InputError("this row is empty")
    used = 0
    for segment, (start, length) in enumerate(zip(row.start.tolist(), row.length.tolist())):
        ids, used = row.shard.ids[start : start + length], used + length
        yield f"document {segment}: {length} tokens from {start}: {' '.join(map(str, ids[:16].tolist()))}" + (" ..." if length > 16 else "")
        scored = row.label_count(start, length)
        yield f"    {made.decode(ids[:scored].tolist())!r}" + _masked(made, ids[scored:].tolist(), colour)
    if used < seq_len:
        yield f"padding: {seq_len - used} positions"


def _masked(made: Tokenizer, ids: list[int], colour: bool) -> str:
    """Positions that predict nothing: a document's last token."""
    if not ids:
        return ""
    text = " ".join("<end>" if token == made.eos_id else repr(made.decode([token])) for token in ids)
    return f" {MASKED if colour else ''}[{visible(text)}: no label]{PLAIN if colour else ''}"


# ---- stats ----


def statistics(path: str, tokenizer: str, seq_len: int, text_column: str = "text", streaming: bool = False) -> list[str]:
    """Lengths and how well each packing fills rows, as lines."""
    if streaming:
        return _stream_statistics(_stream(path, tokenizer, seq_len, text_column=text_column))
    made, sets = opened(settings(path, text_column=text_column), tokenizer, 2048)
    lines = described(made, sets)
    for packing in get_args(Packing):
        rows = Rows(sets["train"], packing, seq_len)
        lines.append(f"packing {packing:<9}: {len(rows):,} rows of {seq_len}, {rows.efficiency():.1%} filled")
    return [*lines, *picture(_lengths(sets["train"]))]


def _lengths(tokens: TokenSet) -> np.ndarray:
    return np.concatenate([np.diff(np.append(shard.document_starts, len(shard.ids))) for shard in tokens.shards])


def picture(lengths: np.ndarray) -> list[str]:
    """Documents by length, in powers of two, as bars; and which share of the tokens is in them."""
    lines = ["documents by tokens (bar), and the share of all tokens in them:"]
    power = np.floor(np.log2(np.maximum(1, lengths))).astype(int)
    counts, tokens = np.bincount(power), np.bincount(power, weights=lengths)
    for n in range(int(power.min()), len(counts)):
        bar = "#" * max(int(counts[n] > 0), round(BAR * int(counts[n]) / int(counts.max())))
        lines.append(f"{1 << n:>9,} to {(2 << n) - 1:>9,}  {counts[n]:>10,}  {bar:<{BAR}}  {tokens[n] / tokens.sum():6.1%}")
    return lines


def _stream_statistics(data: StreamDataset) -> list[str]:
    lines = [data.describe(), f"tokenizer: {data.tokenizer.kind}, {data.tokenizer.vocab_size} tokens"]
    lengths: list[np.ndarray] = []
    for stream, reading in zip(data.streams, data.readings):
        documents, malformed, tokens, size, filled = 0, 0, 0, 0, dict.fromkeys(get_args(Packing), 0)
        numbers = spread(len(stream.pieces), SAMPLED_BLOCKS)
        for block in map(reading.read, numbers):
            starts, ids = block.shard.document_starts, block.shard.ids
            lengths.append(np.diff(np.append(starts, len(ids))))
            documents, malformed, tokens = documents + block.documents, malformed + block.malformed, tokens + len(ids)
            size += int(np.asarray(data.tokenizer.byte_lengths)[ids].sum())
            for packing in filled:
                rows = -(-len(ids) // data.seq_len) if packing == "concat" else plan(packing, starts, len(ids), data.seq_len).rows
                filled[packing] += rows
        lines.append(f"{stream.name}: in {len(numbers)} of its {len(stream.pieces):,} blocks {documents:,} documents, {malformed} malformed, "
                     f"{tokens:,} tokens ({size / max(1, tokens):.2f} bytes per token)")  # fmt: skip
        lines += [f"packing {packing:<9}: {tokens / max(1, rows * data.seq_len):.1%} filled" for packing, rows in filled.items()]
    return [*lines, *picture(np.concatenate(lengths))]


# ---- check ----


def check(
    path: str, tokenizer: str, seq_len: int, packing: str, text_column: str, say: Callable[[str], None]
) -> list[str]:  # fmt: skip
    """Reads all of a source as a stream does, and compares what its rows decode to with its text. Of a prepared folder, whose text
    is not there: checksums, and that every document decodes. DataError at the first difference."""
    wanted: DataSettings = settings(path, seq_len=seq_len, packing=packing, text_column=text_column)
    if is_prepared(path):
        return _check_prepared(*opened(wanted, tokenizer, 2048))
    data = _stream(path, tokenizer, seq_len, packing, text_column)
    totals: dict[str, Any] = dict.fromkeys(("documents", "tokens", "rows", "malformed"), 0)
    for stream, reading in zip(data.streams, data.readings):
        for number, (source, piece) in enumerate(stream.pieces):
            block = reading.read(number)
            texts = [text for text in source.read(piece) if not isinstance(text, Bad) and len(text)]
            _compare(data.tokenizer, [block.row(n, seq_len) for n in range(block.rows)], texts, f"{stream.name}, block {number} {piece}")
            for name, found in (("documents", len(texts)), ("tokens", len(block.shard.ids)), ("rows", block.rows), ("malformed", block.malformed)):
                totals[name] += found
            if number % 1000 == 999:
                say(f"{number + 1:,} of {len(stream.pieces):,} blocks")
    told = ", ".join(f"{number:,} {name}" for name, number in totals.items() if name != "malformed")
    return [f"right: {told}; every token is in one row once, and every document decodes to its text", f"left out: {totals['malformed']} malformed"]


def _compare(tokenizer: Tokenizer, rows: list[Row], texts: list[Any], where: str) -> None:
    parts = sorted((int(start), int(length)) for row in rows for start, length in zip(row.start, row.length))
    shard = rows[0].shard if rows else None
    ids = np.concatenate([shard.ids[start : start + length] for start, length in parts]) if shard is not None else np.zeros(0, np.int64)
    if any(a + b != c for (a, b), (c, _) in itertools.pairwise(parts)) or (shard is not None and len(ids) != len(shard.ids)):
        raise DataError(f"{where}: the rows do not hold every token once")
    ends = (np.append(shard.document_starts[1:], len(ids)) - 1).tolist() if shard is not None and len(ids) else []
    if len(ends) != len(texts):
        raise DataError(f"{where}: {len(texts)} documents became {len(ends)}")
    start = 0
    for end, text in zip(ends, texts):
        found = ids[start:end]
        same = np.array_equal(found, text) if isinstance(text, np.ndarray) else tokenizer.decode(found.tolist()) == text
        if not same or ids[end] != tokenizer.eos_id:
            raise DataError(f"{where}: a document that begins {str(text)[:60]!r} does not decode to its text")
        start = end + 1


def _check_prepared(made: Tokenizer, sets: dict[str, TokenSet]) -> list[str]:
    lines = []
    for split, tokens in sets.items():
        tokens.verify()
        for shard in tokens.shards:
            for start, end in zip(shard.document_starts, np.append(shard.document_starts[1:], len(shard.ids))):
                if shard.ids[end - 1] != made.eos_id:
                    raise DataError(f"{tokens.folder}: a document of {end - start} tokens from {start} does not end with the end-of-document token")
                made.decode(shard.ids[start : end - 1].tolist())
        lines.append(f"{split}: right: {tokens.documents():,} documents, {tokens.tokens():,} tokens; checksums hold and all decode")
    return lines
