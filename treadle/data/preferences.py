"""Preferences to learn from: of each prompt a chosen and a rejected answer, side by side in one row as two isolated documents.

A row of the data is a pair (or several, packed), so no number of processes and no size of a micro-batch ever parts the two.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from treadle.data.batch import Batch
from treadle.data.conversations import TOO_LONG, Conversations, EncodedRows
from treadle.data.documents import Document, Encoded
from treadle.data.messages import Said, pair_in
from treadle.data.shards import Row, Rows, Shard
from treadle.errors import ConfigError


class PairRows(EncodedRows):
    """Two documents for each pair, the chosen one first."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if self.train_on == "all":
            raise ConfigError("data.train_on = all: of preferences the answers alone count; leave it out")

    def document(self, table: dict[str, Any], is_file: bool) -> Document:
        pair = pair_in(table, self.template is not None)
        (chosen, learnt), (rejected, learnt_too) = (self.encode(said) for said in pair)
        if len(chosen) + len(rejected) > self.seq_len:
            return Encoded.left_out(TOO_LONG)
        ids, mask = np.concatenate([chosen, rejected]), np.concatenate([learnt, learnt_too])
        return Encoded(ids, mask, (len(chosen), len(rejected)))


class PackedPairs(Rows):
    """Rows that hold whole pairs: documents 2n and 2n + 1 of a row are the chosen and the rejected answer of its pair n."""

    def unit_starts(self, shard: Shard) -> np.ndarray:
        return shard.document_starts[::2]

    def row(self, number: int) -> Row:
        """Row `number`, its documents by turns chosen and rejected."""
        pairs = super().row(number)
        starts = pairs.shard.document_starts
        second = starts[np.searchsorted(starts, pairs.start) + 1]
        start = np.stack([pairs.start, second], 1).reshape(-1)
        length = np.stack([second - pairs.start, pairs.start + pairs.length - second], 1).reshape(-1)
        return Row(pairs.shard, start, length)


class Preferences(Conversations):
    """Pairs in rows of `seq_len` tokens."""

    rows_class: ClassVar[type[Rows]] = PackedPairs
    encoded: ClassVar[type[EncodedRows]] = PairRows

    @classmethod
    def said(cls, table: dict[str, Any], column: str) -> list[Said]:
        return list(pair_in(table, True))

    def prompts(self, count: int) -> list[list[int]]:
        """One of each pair: both of its documents begin with it."""
        return super().prompts(2 * count)[::2]

    def batch(self, source: np.ndarray, row: np.ndarray) -> Batch:
        made = super().batch(source, row)
        assert made.segments is not None
        made.counts["pairs"] = sum(pairs_of(made))
        return made

    def counted(self, documents: int) -> str:
        """How many pairs, in words."""
        return f"{documents // 2:,} pair(s)"


def pairs_of(batch: Batch) -> list[int]:
    """How many pairs each row of a batch holds, from what is known on the host. ConfigError for an answer without its other one."""
    counts = [sum(run > 0 for run in row) for row in batch.segments or ()]
    if any(count % 2 for count in counts):
        raise ConfigError("a row holds an answer without its other one; DPO needs rows of pairs: --data.dataset preferences")
    return [count // 2 for count in counts]
