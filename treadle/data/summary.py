"""`treadle data`: preparing text and looking at it, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from treadle.data.chosen_sources import held_shares, part_cache, prepared, sources_of
from treadle.data.prepare import (
    Progress,
    is_prepared,
    open_prepared,
    parse_shard,
    prepare_shard,
    tokenizer_for,
)
from treadle.data.settings import DataSettings
from treadle.data.shards import Rows, TokenSet
from treadle.files import cache_root, write_atomically
from treadle.settings import Given, build_section
from treadle.storage.remote import RemotePath, local_copy, path_of
from treadle.text.base import Tokenizer

STATISTICS = "statistics.json"


def settings(path: str, **keys: Any) -> DataSettings:
    """A [data] section from a verb's options; ConfigError names the option that is wrong."""
    given = {f"data.{k}": Given(f"data.{k}", v, "option", False) for k, v in {"path": path, **keys}.items()}
    return build_section("data", DataSettings, given)  # type: ignore[return-value]


def _progress(say: Callable[[str], None] | None) -> Progress:
    def progress(done: int, total: int) -> None:
        if say is not None and total > 1:
            say(f"{done}/{total} pieces")

    return progress


def opened(
    wanted: DataSettings, tokenizer: str, vocab_size: int, output: str | None = None, fresh: bool = False,
    say: Callable[[str], None] | None = None,
) -> tuple[Tokenizer, dict[str, TokenSet]]:  # fmt: skip
    """(tokenizer, token sets by split) of text, which is prepared, or of a prepared folder."""
    if isinstance(wanted.path, str) and is_prepared(wanted.path):
        folder = path_of(wanted.path, part_cache(wanted))
        return Tokenizer.load(local_copy(folder / "tokenizer", cache_root(wanted.cache_dir))), open_prepared(folder)
    (source,) = sources_of(wanted)
    made = tokenizer_for(source, tokenizer, vocab_size, root=cache_root(wanted.cache_dir), held=held_shares(wanted))
    return made, prepared(wanted, source, made, held_shares(wanted), _progress(say), fresh, Path(output) if output else None)


def described(tokenizer: Tokenizer, sets: dict[str, TokenSet]) -> list[str]:
    """What token sets hold, as lines for people."""
    lines = [f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size} tokens"]
    for split, tokens in sets.items():
        s = tokens.statistics
        ratio = s["bytes"] / max(1, s["tokens"])
        lengths = ", ".join(f"{p}% {n}" for p, n in s["length_percentiles"].items())
        lines.append(f"{split}: {s['documents']:,} documents, {s['bytes']:,} bytes, {s['tokens']:,} tokens "
                     f"({ratio:.2f} bytes per token); document lengths: {lengths}")  # fmt: skip
    s = sets["train"].statistics
    lines.append(f"held out: {s['held_out'] if len(sets) > 1 else 'nothing'}; left out: {s['empty']} empty, "
                 f"{s['shorter_than_min_length']} short, {s['malformed']} malformed")  # fmt: skip
    lines += [f"    malformed: {place}" for place in s["malformed_first"]]
    return lines


def prepare_text(
    wanted: DataSettings, tokenizer: str, vocab_size: int, output: str | None, fresh: bool, say: Callable[[str], None]
) -> list[str]:
    """Prepares, and leaves STATISTICS in the folder."""
    made, sets = opened(wanted, tokenizer, vocab_size, output, fresh, say)
    if isinstance(sets["train"].folder, RemotePath):
        return [*described(made, sets), f"prepared already; train on it: treadle train --data.path {wanted.path}"]
    folder = sets["train"].folder.parent
    table = {split: _numbers(tokens, wanted) for split, tokens in sets.items()}
    write_atomically(folder / STATISTICS, json.dumps(table, indent=1).encode())
    rows = ", ".join(f"{numbers['sequences']:,} {split}" for split, numbers in table.items())
    return [*described(made, sets), f"sequences of {wanted.seq_len} tokens: {rows}", f"prepared: {folder} ({STATISTICS})",
            f"train on it: treadle train --data.path {folder}"]  # fmt: skip


def _numbers(tokens: TokenSet, wanted: DataSettings) -> dict[str, Any]:
    s = tokens.statistics
    return {
        "samples": s["documents"], "bytes": s["bytes"], "tokens": s["tokens"],
        "sequences": len(Rows(tokens, wanted.packing, wanted.seq_len)), "sequence_length": wanted.seq_len,
        "length_percentiles": s["length_percentiles"], "empty": s["empty"], "malformed": s["malformed"],
    }  # fmt: skip


def prepare_part(
    wanted: DataSettings, tokenizer: str, vocab_size: int, output: str | None, shard: str, say: Callable[[str], None]
) -> list[str]:
    """One shard of a preparation that several processes or machines share."""
    part = parse_shard(shard)
    (source,) = sources_of(wanted)
    root = cache_root(wanted.cache_dir)
    made = tokenizer_for(source, tokenizer, vocab_size, root=root, held=held_shares(wanted))
    folder, done, total = prepare_shard(
        source, made, part, root=root, held=held_shares(wanted), min_length=wanted.min_length,
        on_bad=wanted.on_bad, workers=wanted.preparation_workers, progress=_progress(say),
        output=Path(output) if output else None,
    )  # fmt: skip
    then = "all are there: the same command without --shard verifies and joins them" if done == total else (
        "when the other shards are done, the same command without --shard verifies and joins them")  # fmt: skip
    return [f"shard {shard} is done; {done} of {total} pieces are in {folder}; {then}"]
