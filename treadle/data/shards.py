"""Prepared tokens on disk: one folder a split, one shard a piece of the source.

shard-00000.bin    ids, little-endian uint16 or uint32
shard-00000.idx    int64 numbers of ids of each document
shard-00000.mask   uint8, where only some tokens are learnt: 1 for those
dataset.json       counts, checksums, tokenizer and statistics; written last
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treadle.data.packing import Plan, plan
from treadle.errors import DataError
from treadle.files import write_atomically
from treadle.storage.arrays import mapped
from treadle.storage.remote import AnyPath, size_of

DATASET_FILE = "dataset.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.bin")  # nothing that could point outside of the folder
SCHEMA = 2  # part of the cache key: data prepared by another layout is prepared anew


def id_type(vocab_size: int) -> np.dtype:
    """The smallest type that holds all ids: two or four bytes, little-endian."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def file_sha256(path: AnyPath) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


@dataclass
class Shard:
    """One shard: ids [N], memory-mapped or read by ranges from a URL, where its documents begin, and which tokens are learnt
    (uint8 [N]; None: all)."""

    ids: Any  # np.ndarray or RemoteArray
    document_starts: np.ndarray
    learnt: Any = None


class TokenSet:
    """The prepared documents of one split of one source."""

    def __init__(self, folder: AnyPath, described: dict[str, Any]) -> None:
        self.folder = folder
        self.described = described
        self.vocab_size: int = described["vocab_size"]
        self.shards = [self._open(record) for record in described["shards"] if record["ids"] > 0]

    @staticmethod
    def load(folder: AnyPath) -> TokenSet:
        """Opens a prepared split; DataError when a shard is missing, cut or has ids outside the vocabulary."""
        try:
            described = json.loads((folder / DATASET_FILE).read_text(encoding="utf-8"))
            assert described["schema"] == SCHEMA and isinstance(described["shards"], list)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as problem:
            raise DataError(f"{folder / DATASET_FILE} is missing or damaged ({problem}); prepare the data again: "
                            "`treadle data prepare PATH --fresh`") from None  # fmt: skip
        try:
            return TokenSet(folder, described)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise DataError(f"{folder / DATASET_FILE} is damaged ({type(problem).__name__}: {problem}); prepare the data again: "
                            "`treadle data prepare PATH --fresh`") from None  # fmt: skip

    def _open(self, record: dict[str, Any]) -> Shard:
        if not _SHARD.fullmatch(str(record["file"])) or not all(type(record[n]) is int for n in ("ids", "documents")):
            raise DataError(f"{self.folder / DATASET_FILE} names a shard that is none: {record['file']!r}")
        again = "; prepare the data again: `treadle data prepare PATH --fresh`"
        path = self.folder / record["file"]
        dtype = id_type(self.vocab_size)
        index = path.with_suffix(".idx")
        files = [(path, record["ids"] * dtype.itemsize), (index, record["documents"] * 8)]
        if record.get("masked"):
            files.append((path.with_suffix(".mask"), record["ids"]))
        for file, size in files:
            if not file.is_file():
                raise DataError(f"{file} is missing{again}")
            if size_of(file) != size:
                raise DataError(f"{file}: {size_of(file)} bytes where dataset.json says {size}{again}")
        lengths = np.frombuffer(index.read_bytes(), dtype="<i8")
        if (lengths <= 0).any() or int(lengths.sum()) != record["ids"]:
            raise DataError(f"{index} is damaged: document lengths do not add up to {record['ids']} ids{again}")
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        return Shard(mapped(path, dtype), starts, mapped(files[2][0], np.dtype("u1")) if len(files) > 2 else None)

    def verify(self) -> None:
        """Reads everything once: checksums and id range. DataError says what is damaged."""
        for record in self.described["shards"]:
            kinds = (".bin", ".idx", ".mask")[: 3 if record.get("masked") else 2]
            for name in (record["file"].replace(".bin", kind) for kind in kinds):
                if file_sha256(self.folder / name) != record["sha256"][name]:
                    raise DataError(f"{self.folder / name} is damaged (checksum differs); prepare the data again")
        for shard in self.shards:
            if int(shard.ids.max()) >= self.vocab_size:
                raise DataError(f"{self.folder} holds id {int(shard.ids.max())}, outside the vocabulary")

    @property
    def fingerprint(self) -> str:
        """A hash of the text, the tokenizer and the form of the files."""
        return self.described["fingerprint"]

    @property
    def statistics(self) -> dict[str, Any]:
        """What was counted while it was prepared: documents, tokens, bytes, lengths."""
        return self.described["statistics"]

    def documents(self) -> int:
        """Documents in all shards."""
        return sum(len(shard.document_starts) for shard in self.shards)

    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(len(shard.ids) for shard in self.shards)

    def document(self, number: int) -> np.ndarray:
        """The ids of document `number`, end-of-document token included. DataError when there is none."""
        for shard in self.shards:
            count = len(shard.document_starts)
            if number < count:
                end = shard.document_starts[number + 1] if number + 1 < count else len(shard.ids)
                return np.asarray(shard.ids[shard.document_starts[number] : end], dtype=np.int32)
            number -= count
        raise DataError(f"there is no document {number}")


def _stored_plan(path: Path, ids: int) -> Plan | None:
    """The plan in a file, None when there is none that fits `ids` tokens or the file holds more than its size."""
    try:
        with zipfile.ZipFile(path) as inside:
            if sum(member.file_size for member in inside.infolist()) > path.stat().st_size:
                return None
        with np.load(path) as stored:
            found = Plan(stored["row_starts"], stored["start"], stored["length"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, MemoryError):
        return None
    rows, start, length = found.row_starts, found.start, found.length
    sound = all(part.ndim == 1 and part.dtype.kind in "iu" for part in (rows, start, length)) and len(start) == len(length)
    sound = sound and len(rows) > 0 and int(rows[0]) == 0 and int(rows[-1]) == len(start) and bool((np.diff(rows) >= 0).all())
    if sound and len(start):
        sound = min(int(start.min()), int(length.min()) - 1) >= 0 and max(int(start.max()), int(length.max())) <= ids
        sound = sound and int((start + length).max()) <= ids
    return found if sound else None


@dataclass
class Row:
    """One row before it becomes tensors: segments of one shard."""

    shard: Shard
    start: np.ndarray  # [segments]
    length: np.ndarray  # [segments]

    def label_count(self, start: int, length: int) -> int:
        """How many positions of a segment have a next token in the same document."""
        end, starts = start + length, self.shard.document_starts
        if end >= len(self.shard.ids):
            return length - 1
        following = int(np.searchsorted(starts, end))
        return length - 1 if following < len(starts) and starts[following] == end else length


def rows_in(shard: Shard, made: Plan | None, row_length: int) -> int:
    """Rows of a shard under its plan; None: concat, cut wherever a row ends."""
    return made.rows if made is not None else -(-len(shard.ids) // row_length)


def row_of(shard: Shard, made: Plan | None, number: int, row_length: int) -> Row:
    """Row `number` of a shard under a plan; without one, the tokens of the shard in equal parts."""
    if made is not None:
        segments = slice(int(made.row_starts[number]), int(made.row_starts[number + 1]))
        return Row(shard, made.start[segments], made.length[segments])
    start, stop = number * row_length, min((number + 1) * row_length, len(shard.ids))
    low, high = np.searchsorted(shard.document_starts, [start, stop], side="right")
    inner = shard.document_starts[low:high]
    bounds = np.concatenate([[start], inner[inner < stop], [stop]])
    return Row(shard, bounds[:-1], np.diff(bounds))


class Rows:
    """A token set seen as rows of `row_length` under one packing; rows never cross shards."""

    def __init__(self, tokens: TokenSet, packing: str, row_length: int) -> None:
        self.tokens = tokens
        self.packing = packing
        self.row_length = row_length
        self._plans: list[Plan | None] = [self._plan(n, shard) for n, shard in enumerate(tokens.shards)]
        counts = [rows_in(shard, p, row_length) for p, shard in zip(self._plans, tokens.shards)]
        self._first_row = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def _plan(self, number: int, shard: Shard) -> Plan | None:
        if self.packing == "concat":
            return None
        # Kept beside the shard: packing 10 million documents takes seconds, reading the plan does not.
        if not isinstance(self.tokens.folder, Path):
            return plan(self.packing, self.unit_starts(shard), len(shard.ids), self.row_length)
        path = self.tokens.folder / f"plan-{number:05d}-{self.packing}-{self.row_length}.npz"
        stored = _stored_plan(path, len(shard.ids))
        if stored is not None:
            return stored
        made = plan(self.packing, self.unit_starts(shard), len(shard.ids), self.row_length)
        try:
            data = io.BytesIO()
            np.savez(data, row_starts=made.row_starts, start=made.start, length=made.length)
            write_atomically(path, data.getvalue())
        except OSError:
            pass  # a read-only folder: the plan is made anew each time
        return made

    def unit_starts(self, shard: Shard) -> np.ndarray:
        """Where what stays in one row begins."""
        return shard.document_starts

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def row(self, number: int) -> Row:
        """Row `number` over all shards."""
        at = int(np.searchsorted(self._first_row, number, side="right")) - 1
        shard, made, local = self.tokens.shards[at], self._plans[at], number - int(self._first_row[at])
        return row_of(shard, made, local, self.row_length)

    def efficiency(self) -> float:
        """Share of positions that hold a token."""
        return self.tokens.tokens() / max(1, len(self) * self.row_length)
