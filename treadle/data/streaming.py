"""Text of any size as a dataset: read, tokenised and packed on the way, in a shuffled order that begins anywhere in O(1).

Nothing is written before. The source is cut into blocks of some 256 kB; lanes.py says in which order they are read. The rows of a
block are packed and shuffled inside it, and a step's rows come from many lanes, so from all over the source. The position is a few
numbers a lane; going on from it reads each lane's block again, wherever it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.data import remembered
from treadle.data.base import BatchPlan, BatchSequence, Dataset, Position
from treadle.data.block_reader import Block, BlockReader, Reading
from treadle.data.encoding import scored_bytes
from treadle.data.lanes import LANES, BlockOrder, GroupCursor, first_cursor, groups_of
from treadle.data.order import Mixture, key, permute, step_draws
from treadle.data.settings import TEXT
from treadle.data.shards import Row
from treadle.data.sources import Piece, Source
from treadle.data.transformed import Shaped
from treadle.errors import CheckpointError, ConfigError, DataError, InputError
from treadle.files import cache_root
from treadle.text.base import Tokenizer

if TYPE_CHECKING:
    from treadle.data.batch import Batch

SMALLEST_BLOCK = 1 << 18  # bytes; 64 lanes of two tokenised blocks are some 20 MB
BYTES_PER_POSITION = 256  # of a block, for each position of a row: some 64 rows, so that the last, short one is 1%
BLOCKS_WANTED = 256  # of a small source, so that every lane has some
JUDGED_FROM = 10_000  # documents before the share of malformed ones can stop a run
MOST_TOLD = 10_000  # blocks with malformed documents that are remembered
SEQUENCE_ROWS = 1024  # of a stream read in sequence without a limit

Held = tuple[Block, np.ndarray, int]  # a block, the order of its rows, its number
Pieces = list[tuple[Source, Piece]]


def block_bytes(seq_len: int, size: int) -> int:
    """Bytes of a block of a source of `size` bytes."""
    return max(1 << 10, min(max(SMALLEST_BLOCK, BYTES_PER_POSITION * seq_len), size // BLOCKS_WANTED))


def spread(blocks: int, count: int) -> list[int]:
    """Up to `count` block numbers, evenly over all."""
    return np.unique(np.linspace(0, blocks - 1, count).astype(int)).tolist()


class Stream:
    """One set of blocks and the order they are read in. name: what people call it."""

    def __init__(self, name: str, pieces: Pieces) -> None:
        self.name, self.pieces = name, pieces

    def signature(self) -> dict[str, str]:
        """Of all files, by name."""
        found: dict[str, str] = {}
        for source in {id(source): source for source, _ in self.pieces}.values():
            found |= source.signature()
        return found


class StreamDataset(Dataset):
    """Rows of `seq_len` tokens from sources that are tokenised as they are read.

    streams: sets of blocks. weights: of the streams, exact in every 1024 rows of the run; needed for more than one.
    """

    name = TEXT
    tokenizer: Tokenizer

    def __init__(
        self, streams: Sequence[Stream], tokenizer: Tokenizer, seq_len: int, packing: str = "concat",
        weights: Sequence[Any] | None = None, shuffle: bool = True, min_length: int = 0, on_bad: str = "skip",
        bad_limit: float = 0.001, cache_dir: str | None = None, shaped_by: Shaped | None = None,
    ) -> None:  # fmt: skip
        self.streams, self.tokenizer, self.seq_len, self.packing = list(streams), tokenizer, seq_len, packing
        self.weights, self.shuffle, self.bad_limit = tuple(weights) if weights is not None else None, shuffle, bad_limit
        self.min_length = min_length
        self.shaped_by = shaped_by or Shaped()
        self._byte_lengths = scored_bytes(tokenizer)
        self._news: list[str] = []
        self._told: set[str] = set()
        self.readings = [Reading(stream.pieces, tokenizer, seq_len, packing, min_length, on_bad) for stream in self.streams]
        self._signature = {stream.name: stream.signature() for stream in self.streams}
        self._memory = cache_root(cache_dir) / "streams"
        remembered.keep(self._memory, self.fingerprint(), self._made_of)

    # ---- what it is ----

    @property
    def start(self) -> Position:
        return {}

    def fingerprint(self) -> str:
        """Equal for equal files (their names, sizes and samples of their content), tokenizer and order."""
        files = [sorted((file.rpartition("/")[2], what) for file, what in found.items()) for found in self._signature.values()]
        described = [files, self.tokenizer.fingerprint(), self.packing, self.seq_len, self.weights, self.shuffle, self.min_length,
                     [len(stream.pieces) for stream in self.streams]]  # fmt: skip
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    @property
    def _made_of(self) -> dict[str, str]:
        return {name: what for found in self._signature.values() for name, what in found.items()}

    def difference(self, fingerprint: str) -> str:
        return remembered.difference(self._memory, fingerprint, self._made_of)

    def stats(self) -> dict[str, Any]:
        sources = {id(source): source for stream in self.streams for source, _ in stream.pieces}.values()
        return {
            "streams": [stream.name for stream in self.streams],
            "files": sum(len(source.files) for source in sources),
            "bytes": sum(source.size() for source in sources),
            "blocks": sum(len(stream.pieces) for stream in self.streams),
            "row_length": self.seq_len,
            "packing": self.packing,
        }

    def describe(self) -> str:
        stats = self.stats()
        return (f"a stream of {stats['files']} file(s), {stats['bytes']:,} bytes, in {stats['blocks']:,} blocks; rows of {self.seq_len}, "
                "tokenised as they are read" + self.shaped_by.remark())  # fmt: skip

    def without_fingerprint(self) -> list[str]:
        return self.shaped_by.unknown

    # ---- reading ----

    def batches(self, position: Position, plan: BatchPlan) -> Iterator[tuple[list[Batch], Position]]:
        from treadle.data.batch import collate_text

        read = _Reader(self, position, plan)
        share = plan.global_batch_size // plan.world_size // plan.accumulation
        try:
            while True:
                rows = read.step()
                micro = [collate_text(rows[i : i + share], self.seq_len, self._byte_lengths) for i in range(0, len(rows), share)]
                yield micro, read.position()
        finally:
            read.close()

    def in_sequence(self, batch_size: int, limit: int | None = None) -> Sequence[Batch]:
        """The first rows of blocks spread evenly over the stream, `limit` in all (1024 without one): a stream has no end to read to."""
        from treadle.data.batch import collate_text

        limit, rows = limit or SEQUENCE_ROWS, []
        for reading in self.readings:
            numbers = spread(len(reading.pieces), 16)
            for number in numbers:
                block = reading.read(number)
                wanted = max(1, limit // len(numbers) // len(self.streams))
                rows += [block.row(i, self.seq_len) for i in range(min(block.rows, wanted))]
        parts = [slice(i, min(i + batch_size, limit)) for i in range(0, min(len(rows), limit), batch_size)]
        return BatchSequence(lambda part: collate_text(rows[part], self.seq_len, self._byte_lengths), parts)

    def rows_in_order(self, seed: int = 0) -> Iterator[Row]:
        """The rows that one process with a global batch of 1 would train on."""
        read = _Reader(self, self.start, BatchPlan(seed))
        while True:
            yield from read.step()

    def join(self, positions: Sequence[Position]) -> Position:
        """Each process has moved its own groups; the furthest of each group counts."""
        if not all(positions):
            return positions[0]
        joined = dict(positions[0])
        groups = len(joined["cursors"][0])
        lanes = LANES // groups
        joined["cursors"] = [
            [max((p["cursors"][s][g] for p in positions), key=lambda c: GroupCursor.from_json(c, lanes).progress) for g in range(groups)]
            for s in range(len(self.streams))
        ]
        return joined

    def rows_of(self, position: Position, plan: BatchPlan) -> list[Any]:
        """[stream, epoch, block, row] of each sample of a process."""
        read = _Reader(self, position, plan.alone())
        try:
            read.step()
            return read.taken
        finally:
            read.close()

    def news(self, position: Position, plan: BatchPlan) -> list[str]:
        said, self._news = self._news, []
        return said


class _Reader:
    """One process's share of the rows from a position on."""

    def __init__(self, data: StreamDataset, position: Position, plan: BatchPlan) -> None:
        self.data, self.plan = data, plan
        self.groups = groups_of(plan.global_batch_size, plan.world_size)
        self.lanes = LANES // self.groups
        own = self.groups // plan.world_size
        self.own = range(plan.rank * own, (plan.rank + 1) * own)
        self.orders = [BlockOrder(len(s.pieces), key(plan.seed, number), data.shuffle) for number, s in enumerate(data.streams)]
        for stream in data.streams:
            if len(stream.pieces) < self.groups:
                raise ConfigError(f"{stream.name} has {len(stream.pieces)} block(s), too few to stream for {self.groups} rows at once; it "
                                  "is small: leave --data.streaming away, or use a smaller global batch")  # fmt: skip
        self.step_number, self.cursors = self._taken_up(position)
        self.readers = [BlockReader(reading, plan.workers) for reading in data.readings]
        self.held: dict[tuple[int, int], Held] = {}  # by stream and lane
        self.seen: dict[tuple[int, int], list[int]] = {}  # (stream, group) -> documents, malformed ones, of this epoch
        self.rows_in_epoch: dict[tuple[int, int], int] = {}
        self.begun = (-1, -1, -1)  # (stream, group, epoch) begun last
        self.taken: list[list[int]] = []  # names of the rows of the last step
        self.per_group = plan.global_batch_size // self.groups
        self.share = Mixture.of(data.weights, plan.seed, data.shuffle, plan.global_batch_size) if data.weights is not None else None
        for number in range(len(data.streams)):
            for turn in range(self.lanes):  # in the order in which rows will ask
                for group in self.own:
                    self._request(number, group, (self.cursors[number][group].turn + turn) % self.lanes, 0)

    def _taken_up(self, position: Position) -> tuple[int, list[list[GroupCursor]]]:
        streams = len(self.data.streams)
        if not position:
            return 0, [[first_cursor(self.lanes) for _ in range(self.groups)] for _ in range(streams)]
        try:
            step, found = int(position["step"]), position["cursors"]
            counts = {len(cursors) for cursors in found}
        except (TypeError, KeyError, ValueError):
            raise CheckpointError("the checkpoint's position is not one of a stream; was the run started without --data.streaming?") from None
        if len(found) != streams or counts != {self.groups}:
            raise CheckpointError(f"the checkpoint's position is of {len(found)} stream(s) in {sorted(counts)} groups, not of {streams} in "
                                  f"{self.groups}: the weights or the global batch were others")  # fmt: skip
        return step, [[GroupCursor.from_json(c, self.lanes) for c in cursors] for cursors in found]

    def position(self) -> Position:
        return {"step": self.step_number, "cursors": [[cursor.to_json() for cursor in cursors] for cursors in self.cursors]}

    def step(self) -> list[Row]:
        """The rows of this process in the next step, in order."""
        plan, rows = self.plan, []
        draws = step_draws(self.step_number, plan.global_batch_size, plan.rank, plan.world_size)
        sources = self.share.draws(draws)[0] if self.share is not None else np.zeros(len(draws), dtype=np.int64)
        self.taken = []
        for at, source in enumerate(sources.tolist()):
            rows.append(self._next(source, self.own[at // self.per_group]))
        self.step_number += 1
        return rows

    def _next(self, stream: int, group: int) -> Row:
        """The next row of a group: of the lane whose turn it is, passing over those that are through."""
        cursor, order, passed = self.cursors[stream][group], self.orders[stream], 0
        while True:
            lane = cursor.turn
            place = cursor.lanes[lane]
            global_lane = group * self.lanes + lane
            while place[0] < order.count(global_lane):
                block, rows, block_number = self._held(stream, group, lane)
                if place[1] < block.rows:
                    number = int(rows[place[1]])
                    self.taken.append([stream, cursor.epoch, block_number, number])
                    self.rows_in_epoch[stream, group] = self.rows_in_epoch.get((stream, group), 0) + 1
                    place[1] += 1
                    cursor.turn = (lane + 1) % self.lanes
                    return block.row(number, self.data.seq_len)
                self.held.pop((stream, global_lane))
                place[0], place[1] = place[0] + 1, 0
            cursor.turn, passed = (lane + 1) % self.lanes, passed + 1
            if passed > self.lanes:  # all lanes are through
                self._next_epoch(stream, group)
                passed = 0

    def _next_epoch(self, stream: int, group: int) -> None:
        cursor, name = self.cursors[stream][group], self.data.streams[stream].name
        documents, malformed = self.seen.pop((stream, group), [0, 0])
        self._judge(name, documents, malformed, 0)
        if not self.rows_in_epoch.pop((stream, group), 0) and self.begun == (stream, group, cursor.epoch):
            raise (DataError if malformed else InputError)(f"{name}: an epoch of {documents} document(s), {malformed} malformed, gave no row")
        self.begun = (stream, group, cursor.epoch + 1)  # from its first row on: a resumed epoch may be at its end
        cursor.epoch, cursor.turn, cursor.lanes = cursor.epoch + 1, 0, [[0, 0] for _ in range(self.lanes)]
        if group == 0:
            self.data._news.append(f"{name}: epoch {cursor.epoch + 1} begins")
        for lane in range(self.lanes):
            self._request(stream, group, lane, 0)

    def _request(self, stream: int, group: int, lane: int, further: int) -> None:
        cursor, global_lane = self.cursors[stream][group], group * self.lanes + lane
        ordinal = cursor.lanes[lane][0] + further
        if ordinal < self.orders[stream].count(global_lane):
            self.readers[stream].request(self.orders[stream].block(cursor.epoch, global_lane, ordinal))

    def _held(self, stream: int, group: int, lane: int) -> Held:
        global_lane = group * self.lanes + lane
        found = self.held.get((stream, global_lane))
        if found is None:
            cursor, order = self.cursors[stream][group], self.orders[stream]
            number = order.block(cursor.epoch, global_lane, cursor.lanes[lane][0])
            block = self.readers[stream].take(number)
            self._request(stream, group, lane, 1)
            rows = np.arange(block.rows)
            if self.data.shuffle and block.rows:
                rows = permute(rows, block.rows, key(self.plan.seed, stream, cursor.epoch, number))
            found = self.held[stream, global_lane] = block, rows, number
            self._account(stream, group, block)
        return found

    def _account(self, stream: int, group: int, block: Block) -> None:
        seen = self.seen.setdefault((stream, group), [0, 0])
        seen[0] += block.documents
        seen[1] += block.malformed
        name = self.data.streams[stream].name
        told = self.data._told
        if block.malformed and block.places[0] not in told:  # once, not every epoch
            if len(told) < MOST_TOLD:
                told.add(block.places[0])
            more = f" (and {block.malformed - 3} more here)" if block.malformed > 3 else ""
            self.data._news.append(f"left out: {'; '.join(block.places[:3])}{more}")
        self._judge(name, seen[0], seen[1], JUDGED_FROM)

    def _judge(self, name: str, documents: int, malformed: int, enough: int) -> None:
        """DataError for too large a share of malformed documents."""
        total = documents + malformed
        if total >= enough and malformed > max(10, self.data.bad_limit * total):
            raise DataError(f"{name}: {malformed} of the {total} documents read so far are malformed; mend the data, or allow more: "
                            "--data.bad_limit 1")  # fmt: skip

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
