"""Blocks of a stream, read and tokenised ahead by worker processes, or here when they are wanted."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.data.encoding import Encoder, LeftOut, well_formed
from treadle.data.packing import Plan, plan
from treadle.data.shards import Row, Shard, id_type, row_of, rows_in
from treadle.data.sources import Piece, Source
from treadle.errors import DataError
from treadle.processes import begin_data_worker
from treadle.storage.remote import state_of_file
from treadle.text.base import Tokenizer


@dataclass
class Block:
    """A tokenised block: its rows under one packing, and what was left out of it."""

    shard: Shard
    plan: Plan | None
    rows: int
    documents: int = 0
    malformed: int = 0
    places: list[str] = field(default_factory=list)

    def row(self, number: int, length: int) -> Row:
        """Row `number` of `length` tokens."""
        return row_of(self.shard, self.plan, number, length)


class Reading:
    """How the blocks of a stream are read. pieces: (source, piece) of each."""

    def __init__(
        self, pieces: Sequence[tuple[Source, Piece]], tokenizer: Tokenizer, seq_len: int, packing: str, min_length: int, on_bad: str
    ) -> None:  # fmt: skip
        self.pieces, self.tokenizer, self.seq_len, self.packing = list(pieces), tokenizer, seq_len, packing
        self.min_length, self.on_bad = min_length, on_bad
        files = {file for source in {id(source): source for source, _ in self.pieces}.values() for file in source.files}
        self.files = {str(file): (file, state_of_file(file)) for file in files}

    def read(self, number: int) -> Block:
        """DataError for a file that is not as it was when the stream was opened."""
        source, piece = self.pieces[number]
        for file in piece.files:
            self._check(file)
        encoder, documents, left_out = Encoder(self.tokenizer, self.min_length), 0, LeftOut()
        for _, document in well_formed(source.read(piece), self.on_bad, left_out):
            documents += 1
            encoder.add(document, piece.files[0] if piece.files else "the data")
        encoder.flush()
        ids = encoder.joined().astype(id_type(self.tokenizer.vocab_size))
        starts = np.concatenate([[0], np.cumsum(encoder.lengths)[:-1]]).astype(np.int64) if encoder.lengths else np.zeros(0, np.int64)
        made = None if self.packing == "concat" else plan(self.packing, starts, len(ids), self.seq_len)
        shard = Shard(ids, starts)
        return Block(shard, made, rows_in(shard, made, self.seq_len), documents, left_out.count, left_out.places)

    def _check(self, file: str) -> None:
        if file not in self.files:
            return
        path, then = self.files[file]
        try:
            now = state_of_file(path)  # remote files look after themselves
        except OSError as problem:
            raise DataError(f"{file} cannot be read any more ({problem.strerror}); the run goes on from its checkpoint when it is "
                            "there again") from None  # fmt: skip
        if now != then:
            raise DataError(f"{file} was changed while the stream was read (size {then.size} -> {now.size}); the order of "
                            "a run holds only for the data it was started with")  # fmt: skip


class BlockReader:
    """Gives blocks by number; with workers, those that were requested are made ahead, each by one of them."""

    def __init__(self, reading: Reading, workers: int) -> None:
        self.reading = reading
        self._made: dict[int, Future[Block]] = {}
        self._pool = None
        if workers:  # forked, so that functions of the user need not be sent
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(workers, context, _begin_worker, (reading,))

    def request(self, number: int) -> None:
        """Says that a block will be wanted; a worker begins with it."""
        if self._pool is None or number in self._made:
            return
        with contextlib.suppress(BrokenProcessPool):  # said where the block is taken
            self._made[number] = self._pool.submit(_read_in_worker, number)

    def take(self, number: int) -> Block:
        """The block, waited for where a worker makes it; DataError when a worker was ended from outside."""
        if self._pool is None:
            return self.reading.read(number)
        self.request(number)
        try:
            if number not in self._made:
                raise BrokenProcessPool
            return self._made.pop(number).result()
        except BrokenProcessPool:
            raise DataError("a data worker was ended from outside (by the system, for memory?); the same command continues, with fewer "
                            "workers: --num_workers 0") from None  # fmt: skip

    def close(self) -> None:
        """Ends the workers without waiting for what they make."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


_reading: Any = None


def _begin_worker(reading: Reading) -> None:
    global _reading
    _reading = reading
    begin_data_worker()


def _read_in_worker(number: int) -> Block:
    return _reading.read(number)
