"""Where documents come from: text files, JSON lines, parquet, raw token files, Hugging Face data sets.

A source is cut into pieces (about 16 MB each) that are read independently, so that preparation runs in parallel and
restarts where it stopped. Reading a piece yields documents and, in their place, malformed ones as `Bad` records.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from treadle.data.compressed import COMPRESSED, content_size, open_bytes, reopened
from treadle.errors import ConfigError, InputError, MissingExtra
from treadle.registry import Registry

PIECE_BYTES = 16 << 20
FEWEST_PARTS = 256  # of a source that is streamed
SAMPLE = 1 << 16  # bytes of a file that are compared at three places
BUNDLED = {"austen": "austen.txt.xz"}  # the corpus that ships inside the package
HUB = {"tinystories": "roneneldan/TinyStories"}  # data sets of the Hugging Face hub that have a short name here
LINES = (".jsonl", ".ndjson", ".json")  # one JSON object a line
KINDS = {".txt": "text", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet", ".bin": "bin"}
SUFFIXES = tuple(KINDS)

SOURCES = Registry(
    "source",
    {
        "text": "treadle.data.sources:TextSource",
        "jsonl": "treadle.data.sources:JsonLinesSource",
        "csv": "treadle.data.csv_source:CsvSource",
        "parquet": "treadle.data.parquet_source:ParquetSource",
        "bin": "treadle.data.sources:TokenFileSource",
        "huggingface": "treadle.data.sources:HuggingFaceSource",
    },
    base="treadle.data.sources:Source",
)


@dataclass(frozen=True)
class Bad:
    """A malformed document: where it is and what is wrong with it."""

    file: str
    line: int | None
    offset: int
    reason: str

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line is not None else ""
        return f"{self.file}{line}, byte {self.offset}: {self.reason}"


@dataclass(frozen=True)
class Piece:
    """One unit of reading: whole files, or the byte (or row) range [start, stop) of one file; of its documents, every `parts`-th."""

    files: tuple[str, ...]
    start: int = 0
    stop: int = -1  # -1: to the end
    part: int = 0
    parts: int = 1


Document = str | np.ndarray  # text, or the ids of an already tokenised document


class Source:
    """A set of documents in a fixed order. piece_bytes: about how much of the content is read as one piece."""

    piece_bytes = PIECE_BYTES

    def __init__(self, files: list[Path], column: str = "text", separator: str | None = None) -> None:
        self.files = files
        self.column = column
        self.separator = separator

    def identity(self) -> str:
        """Changes when the files do: names, sizes and modification times (their contents are hashed when prepared)."""
        described = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in self.files]
        text = json.dumps([type(self).__name__, described, self.column, self.separator])
        return hashlib.sha256(text.encode()).hexdigest()

    def signature(self) -> dict[str, str]:
        """What tells that the content is the same, by file and without reading all of it: size, and a hash of its first, middle and
        last 64 kB."""
        return {str(f): _sampled(f) for f in self.files}

    def size(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.files)

    def ended_by(self, eos_id: int) -> None:
        """Told, before reading, what ends a document in the tokenizer; for sources of ids."""

    def pieces(self) -> list[Piece]:
        raise NotImplementedError

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        raise NotImplementedError

    def count(self) -> int:
        """About how many documents there are; decides how text is held out."""
        raise NotImplementedError


def _sampled(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        for at in (0, size // 2, max(0, size - SAMPLE)):
            stream.seek(at)
            digest.update(stream.read(SAMPLE))
    return f"{size}:{digest.hexdigest()[:32]}"


def byte_ranges(file: Path, size: int, step: int, mark: bytes | None = None) -> list[Piece]:
    """A file of lines in pieces of about `step` bytes that end with a line (with `mark`: with a line equal to it)."""
    starts = [0]
    with open_bytes(file) as stream:
        for target in range(step, size, step):
            if target < starts[-1]:  # a line longer than a piece
                continue
            stream.seek(target)
            line = stream.readline()
            while mark is not None and line and line.rstrip(b"\r\n") != mark:
                line = stream.readline()
            if starts[-1] < stream.tell() < size:
                starts.append(stream.tell())
    return [Piece((str(file),), a, b) for a, b in zip(starts, [*starts[1:], size])]


def _decode_lines(raw: bytes, file: str, offset: int, first_line: int | None) -> Iterator[str | Bad]:
    """UTF-8 text; where it is broken, the good lines and a Bad for each broken one."""
    if b"\x00" not in raw:
        try:
            yield raw.decode("utf-8")
            return
        except UnicodeDecodeError:
            pass
    line = first_line
    for one in raw.splitlines(keepends=True):
        if b"\x00" in one:
            yield Bad(file, line, offset + one.index(b"\x00"), "a NUL byte: a binary or UTF-16 file?")
        else:
            try:
                yield one.decode("utf-8")
            except UnicodeDecodeError as problem:
                yield Bad(file, line, offset + problem.start, "not UTF-8; convert with `iconv -f latin1 -t utf-8`")
        offset += len(one)
        line = line + 1 if line is not None else None


class TextSource(Source):
    """.txt files (also .xz, .gz, .zst): a file is a document, or a separator line ends one.

    A file above piece_bytes is read in ranges that end at a line (or separator) end, each a document of its own, so that
    memory stays bounded.
    """

    def pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        group: list[str] = []
        held = 0
        for file in self.files:
            size = content_size(file)
            if size > self.piece_bytes and file.suffix != ".xz":
                pieces += byte_ranges(file, size, self.piece_bytes, None if self.separator is None else self.separator.encode())
                continue
            if group and held + size > self.piece_bytes:
                pieces.append(Piece(tuple(group)))
                group, held = [], 0
            group.append(str(file))
            held += size
        return [*pieces, Piece(tuple(group))] if group else pieces

    def _bytes(self, file: str, start: int = 0, stop: int = -1) -> bytes:
        if file.endswith(".xz"):
            import lzma

            return lzma.decompress(Path(file).read_bytes())
        with opened(file) as stream:
            stream.seek(start)
            return stream.read(stop - start if stop >= 0 else -1)

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        for file in piece.files:
            text: list[str] = []
            raw = self._bytes(file, piece.start, piece.stop)
            for part in _decode_lines(raw, file, piece.start, 1 if piece.start == 0 else None):
                if isinstance(part, Bad):
                    yield part
                else:
                    text.append(part)
            if self.separator is None:
                yield "".join(text)
            else:
                yield from self._split("".join(text))

    def _split(self, text: str) -> Iterator[str]:
        document: list[str] = []
        for line in io.StringIO(text, newline=""):
            if line.rstrip("\r\n") == self.separator:
                yield "".join(document)
                document = []
            else:
                document.append(line)
        if document:
            yield "".join(document)

    def count(self) -> int:
        parts = [(file, piece) for piece in self.pieces() for file in piece.files]
        if self.separator is None:
            return len(parts)
        mark = self.separator.encode()
        return sum(self._bytes(file, piece.start, piece.stop).count(mark) + 1 for file, piece in parts)


class JsonLinesSource(Source):
    """.jsonl files (also .json and .ndjson, .gz, .zst): one JSON object a line, the text under `column`."""

    def pieces(self) -> list[Piece]:
        for file in self.files:
            if not file.name.endswith(LINES[:2]):  # .json may be either
                with open_bytes(file) as stream:
                    if stream.read(64).lstrip()[:1] == b"[":
                        raise InputError(f"{file} is one JSON array; write an object a line: jq -c '.[]' {file} > {file.stem}.jsonl")
        return [piece for file in self.files for piece in byte_ranges(file, content_size(file), self.piece_bytes)]

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        (file,) = piece.files
        with opened(file) as stream:
            stream.seek(piece.start)
            offset, line = piece.start, 1 if piece.start == 0 else None
            while offset < piece.stop:
                raw = stream.readline()
                if not raw:
                    break
                if raw.strip():
                    yield self._one(raw, file, line, offset)
                offset += len(raw)
                line = line + 1 if line is not None else None

    def _one(self, raw: bytes, file: str, line: int | None, offset: int) -> Document | Bad:
        try:
            row = json.loads(raw)
        except UnicodeDecodeError as problem:
            return Bad(file, line, offset + problem.start, "not UTF-8")
        except RecursionError:
            return Bad(file, line, offset, "JSON nested too deeply")
        except ValueError as problem:
            at = offset + getattr(problem, "pos", 0)
            return Bad(file, line, at, f"broken JSON ({getattr(problem, 'msg', problem)})")
        if not isinstance(row, dict) or self.column not in row:
            have = ", ".join(list(row)[:8]) if isinstance(row, dict) else type(row).__name__
            return Bad(file, line, offset, f"no key {self.column!r} (there is: {have}); set --data.text_column")
        return text_of(row[self.column], file, line, offset, self.column)

    def count(self) -> int:
        return count_lines(self.files)


def count_lines(files: list[Path]) -> int:
    """Line ends of files, up to a million and what the last 16 MB hold: the rule it serves asks only for a hundred."""
    total = 0
    for file in files:
        with open_bytes(file) as stream:
            while total < 1_000_000 and (block := stream.read(1 << 24)):
                total += block.count(b"\n")
    return total


def opened(file: str) -> AbstractContextManager[BinaryIO]:
    """A plain file is closed again; a compressed one stays open for the next piece."""
    return nullcontext(reopened(file)) if file.endswith(COMPRESSED) else open(file, "rb")


def text_of(value: Any, file: str, line: int | None, offset: int, column: str) -> Document | Bad:
    if not isinstance(value, str):
        return Bad(file, line, offset, f"{column!r} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return Bad(file, line, offset, "text with an unpaired surrogate, which UTF-8 cannot hold")
    if "\x00" in value:
        return Bad(file, line, offset, "a NUL character")
    return value


class TokenFileSource(Source):
    """Raw .bin files of little-endian uint16 ids, documents ended by the tokenizer's end-of-document token."""

    eos_id: int | None = None

    def ended_by(self, eos_id: int) -> None:
        self.eos_id = eos_id

    def pieces(self) -> list[Piece]:
        return [Piece((str(file),)) for file in self.files]

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        (file,) = piece.files
        if os.path.getsize(file) % 2:
            yield Bad(file, None, os.path.getsize(file) - 1, "an odd number of bytes cannot hold uint16 ids")
            return
        ids = np.memmap(file, dtype="<u2", mode="r") if os.path.getsize(file) else np.zeros(0, dtype="<u2")
        ends = np.flatnonzero(ids == self.eos_id) if self.eos_id is not None else np.zeros(0, dtype=np.int64)
        start = 0
        for end in [*ends.tolist(), len(ids)]:
            if end > start:
                yield np.asarray(ids[start:end], dtype=np.int32)
            start = end + 1

    def count(self) -> int:
        return len(self.files)


class HuggingFaceSource(Source):
    """A data set of the `datasets` library: a name on the hub or a local folder."""

    ROWS = 20_000

    def __init__(self, name: str, config: str | None, split: str, column: str, limit: int | None = None) -> None:
        try:
            import datasets
        except ImportError:
            raise MissingExtra(f"the Hugging Face data set {name!r}", "hf") from None
        self.name, self.config, self.split, self.column = name, config, split, column
        try:
            if Path(name).is_dir() and (Path(name) / "dataset_info.json").is_file():
                self.rows = datasets.load_from_disk(name)
            elif Path(name).is_dir() and (Path(name) / "dataset_dict.json").is_file():
                self.rows = datasets.load_from_disk(name)[split]
            elif limit is not None and not Path(name).exists():  # fetches no more than it takes
                rows = list(datasets.load_dataset(name, config, split=split, streaming=True).take(limit))
                self.rows = datasets.Dataset.from_list(rows)
            else:
                self.rows = datasets.load_dataset(name, config, split=split)
            if limit is not None:
                self.rows = self.rows.select(range(min(limit, len(self.rows))))
        except Exception as problem:  # the library's errors have no common base
            raise InputError(f"data set {name!r} cannot be loaded: {problem}. Without a connection, give local text: a .txt, "
                             ".jsonl or .parquet file, or a folder of them") from None  # fmt: skip
        if column not in self.rows.column_names:
            raise InputError(f"data set {name!r} has no column {column!r} (there is: "
                             f"{', '.join(self.rows.column_names)}); set --data.text_column")  # fmt: skip
        super().__init__([], column)

    def identity(self) -> str:
        text = json.dumps(["hf", self.name, self.config, self.split, self.column, self.rows._fingerprint])
        return hashlib.sha256(text.encode()).hexdigest()

    def signature(self) -> dict[str, str]:
        return {self.name: self.rows._fingerprint}

    def size(self) -> int:
        return int(self.rows.dataset_size or 0)

    def pieces(self) -> list[Piece]:
        total, step = len(self.rows), self.ROWS
        if self.piece_bytes < PIECE_BYTES:
            step = max(1, min(step, total // FEWEST_PARTS, total * self.piece_bytes // max(1, self.size())))
        return [Piece((), a, min(a + step, total)) for a in range(0, total, step)]

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        for row, value in enumerate(self.rows[piece.start : piece.stop][self.column]):
            yield text_of(value, self.name, piece.start + row, 0, self.column)

    def count(self) -> int:
        return len(self.rows)


class WrappedSource(Source):
    """Base of sources that read another one: all of it, as it stands, where a subclass says nothing else."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.files, source.column, source.separator)
        self.source, self.piece_bytes = source, source.piece_bytes

    def signature(self) -> dict[str, str]:
        return self.source.signature()

    def size(self) -> int:
        return self.source.size()

    def ended_by(self, eos_id: int) -> None:
        self.source.ended_by(eos_id)

    def pieces(self) -> list[Piece]:
        self.source.piece_bytes = self.piece_bytes
        return self.source.pieces()

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        return self.source.read(piece)

    def count(self) -> int:
        return self.source.count()


class FirstDocuments(WrappedSource):
    """The first `limit` documents of another source; malformed ones are passed on and not counted."""

    def __init__(self, source: Source, limit: int) -> None:
        super().__init__(source)
        self.limit = limit
        self._share: dict[Piece, int] = {}

    def ended_by(self, eos_id: int) -> None:
        super().ended_by(eos_id)
        if isinstance(self.source, TokenFileSource):  # it has other documents now
            self._share = {}

    def identity(self) -> str:
        return hashlib.sha256(f"first {self.limit} of {self.source.identity()}".encode()).hexdigest()

    def pieces(self) -> list[Piece]:
        if not self._share or self.source.piece_bytes != self.piece_bytes:  # read once here: nobody else knows how many documents a piece holds
            left, self._share = self.limit, {}
            for piece in super().pieces():
                if left == 0:
                    break
                good = sum(1 for _ in islice((d for d in self.source.read(piece) if not isinstance(d, Bad)), left))
                self._share[piece], left = good, left - good
        return list(self._share)

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        self.pieces()
        left = self._share[piece]
        for document in self.source.read(piece):
            if left == 0:
                return
            left -= not isinstance(document, Bad)
            yield document

    def count(self) -> int:
        return min(self.limit, self.source.count())


def open_source(
    path: str | Path, column: str = "text", separator: str | None = None, limit: int | None = None
) -> Source:
    """The source at a path: a file by its suffix, a folder of files of one suffix, or by name a bundled corpus or a data set of
    the hub; of all, the first `limit` documents.

    Raises InputError when there is nothing, or nothing readable, there.
    """
    if str(path) in HUB and not Path(path).exists():
        return HuggingFaceSource(HUB[str(path)], None, "train", column, limit)
    found = _source_at(path, column, separator)
    return found if limit is None else FirstDocuments(found, limit)


def _source_at(path: str | Path, column: str, separator: str | None) -> Source:
    if str(path) in BUNDLED and not Path(path).exists():
        file = Path(__file__).parent.parent / "corpus" / BUNDLED[str(path)]
        return TextSource([file], column, separator)
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a file or folder of {', '.join(SUFFIXES)}, or "
                         f"{', '.join([*BUNDLED, *HUB])}")  # fmt: skip
    if path.is_file():
        files = [path]
    else:
        files = sorted(f for f in path.rglob("*") if kind_of(f) in KINDS and f.is_file())
        if not files:
            raise InputError(f"{path} holds no {', '.join(SUFFIXES)} file")
    kinds = {kind_of(f) for f in files}
    if len(kinds) > 1:
        raise ConfigError(f"{path} mixes {', '.join(sorted(map(str, kinds)))}; give one kind, or a list of paths in data.path")
    if all(f.stat().st_size == 0 for f in files):
        raise InputError(f"{path} is empty; there is nothing to train on")
    kind = kinds.pop()
    if kind not in KINDS:
        raise InputError(f"{path}: {kind or 'a file without suffix'} is not read; give {', '.join(SUFFIXES)}")
    return SOURCES.get(KINDS[kind])(files, column, separator)


def kind_of(file: Path) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    *_, inner, last = ["", "", *file.suffixes]
    kind = inner if last in (*COMPRESSED, ".xz") and inner in (".txt", ".csv", *LINES) else last
    return ".jsonl" if kind in LINES else kind
