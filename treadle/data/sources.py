"""Where documents come from: text files, JSON lines, parquet, raw token files, Hugging Face data sets.

A source is cut into pieces (about 16 MB each) that are read independently, so that preparation runs in parallel and
restarts where it stopped. Reading a piece yields documents and, in their place, malformed ones as `Bad` records.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from treadle.data.compressed import COMPRESSED, content_size, open_bytes, reopened
from treadle.data.documents import Bad, Document, Record
from treadle.errors import ConfigError, InputError
from treadle.registry import Registry
from treadle.storage.arrays import mapped
from treadle.storage.cache import PART_BYTES, PartCache
from treadle.storage.remote import AnyPath, RemotePath, path_of, size_of, state_of_file

PIECE_BYTES = 16 << 20
FEWEST_PARTS = 256  # of a source that is streamed
SAMPLE = 1 << 16  # bytes of a file that are compared at three places
# What ships inside the package, by name.
BUNDLED = {"austen": "austen.txt.xz", "conversations": "conversations.jsonl", "preferences": "preferences.jsonl"}
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
        "huggingface": "treadle.data.huggingface_source:HuggingFaceSource",
    },
    base="treadle.data.sources:Source",
)


@dataclass(frozen=True)
class Piece:
    """One unit of reading: whole files, or the byte (or row) range [start, stop) of one file; of its documents, every `parts`-th."""

    files: tuple[str, ...]
    start: int = 0
    stop: int = -1  # -1: to the end
    part: int = 0
    parts: int = 1


class Source:
    """A set of documents in a fixed order. piece_bytes: about how much of the content is read as one piece. whole_rows: documents are
    rows of a table (Record) where the files hold such. indivisible: no document is cut for a part of it to be held out."""

    piece_bytes = PIECE_BYTES
    whole_rows = False
    indivisible = False

    def __init__(self, files: Sequence[AnyPath], column: str = "text", separator: str | None = None) -> None:
        self.files = list(files)
        self._by_name = {str(file): file for file in self.files}
        self.column = column
        self.separator = separator

    def identity(self) -> str:
        """Changes when the files do: names, sizes and modification times or ETags (their contents are hashed when prepared)."""
        described = [[str(f.resolve()), now.size, now.version] for f in self.files for now in [state_of_file(f)]]
        text = json.dumps([type(self).__name__, described, self.column, self.separator])
        return hashlib.sha256(text.encode()).hexdigest()

    def signature(self) -> dict[str, str]:
        """What tells that the content is the same, by file and without reading all of it: size, and a hash of its first, middle and
        last 64 kB."""
        return {str(f): _sampled(f) for f in self.files}

    def size(self) -> int:
        """Bytes on disk."""
        return sum(size_of(f) for f in self.files)

    def file(self, piece: Piece) -> AnyPath:
        """The one that a piece is a part of."""
        return self._by_name[piece.files[0]]

    def ended_by(self, eos_id: int) -> None:
        """Told, before reading, what ends a document in the tokenizer; for sources of ids."""

    def pieces(self) -> list[Piece]:
        """The parts that are read (and prepared) independently, in order."""
        raise NotImplementedError

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The documents of one piece, in order; malformed ones as Bad."""
        raise NotImplementedError

    def count(self) -> int:
        """About how many documents there are; decides how text is held out."""
        raise NotImplementedError


def _sampled(file: AnyPath) -> str:
    if isinstance(file, RemotePath):  # an ETag or checksum of its server: nothing is fetched
        now = file.state()
        return f"{now.size}:{hashlib.sha256(now.version.encode()).hexdigest()[:32]}"
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        for at in (0, size // 2, max(0, size - SAMPLE)):
            stream.seek(at)
            digest.update(stream.read(SAMPLE))
    return f"{size}:{digest.hexdigest()[:32]}"


def byte_ranges(file: AnyPath, size: int, step: int) -> list[Piece]:
    """A file of lines in ranges of `step` bytes. Its lines are not looked for here, which would be reading all of a remote file: a
    range holds the lines that begin behind its first byte and up to its last (`first_line`)."""
    return [Piece((str(file),), at, min(at + step, size)) for at in range(0, max(size, 1), step)]


def first_line(stream: BinaryIO, piece: Piece, mark: bytes | None = None) -> int | None:
    """Where the first line of a range begins, and there the stream is then; with `mark`: the first behind a line equal to it. None
    where none does."""
    if piece.start == 0:
        stream.seek(0)
        return 0
    at, cut = piece.start, b""
    if mark is not None:  # the line that the range begins in is compared whole; one that begins farther back is longer than the mark
        back = max(0, at - len(mark) - 3)
        stream.seek(back)
        before = stream.read(at - back)
        cut = before[before.rfind(b"\n") + 1 :]
    stream.seek(at)
    while at < piece.stop:
        line = stream.readline(piece.stop - at)
        at += len(line)
        if line.endswith(b"\n") and mark in (None, (cut + line).rstrip(b"\r\n")):
            return at
        if not line:
            break
        cut = b""
    return None


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
        """Small files together, large ones in ranges that end at a line."""
        pieces: list[Piece] = []
        group: list[str] = []
        held = 0
        for file in self.files:
            size = content_size(file)
            if size > self.piece_bytes and file.suffix != ".xz":
                pieces += byte_ranges(file, size, self.piece_bytes)
                continue
            if group and held + size > self.piece_bytes:
                pieces.append(Piece(tuple(group)))
                group, held = [], 0
            group.append(str(file))
            held += size
        return [*pieces, Piece(tuple(group))] if group else pieces

    def _bytes(self, piece: Piece) -> Iterator[tuple[AnyPath, int, bytes]]:
        """(file, place in it, content) of each document before it is split."""
        mark = None if self.separator is None else self.separator.encode()
        for file in (self._by_name[name] for name in piece.files):
            if file.suffix == ".xz":
                import lzma

                yield file, 0, lzma.decompress(file.read_bytes())
                continue
            if piece.stop < 0 and file.suffix not in COMPRESSED:
                yield file, 0, file.read_bytes()
                continue
            with opened(file, piece) as stream:
                if piece.stop < 0:
                    stream.seek(0)
                    yield file, 0, stream.read()
                    continue
                if (begin := first_line(stream, piece, mark)) is None:
                    continue
                content = [stream.read(piece.stop - begin)]
                cut = content[0][content[0].rfind(b"\n") + 1 :]  # of a line that the range ends in
                while line := stream.readline():
                    content.append(line)
                    if mark in (None, (cut + line).rstrip(b"\r\n")):
                        break
                    cut = b""
                yield file, begin, b"".join(content)

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """A document a file, or between two separator lines."""
        for file, begin, raw in self._bytes(piece):
            text: list[str] = []
            for part in _decode_lines(raw, str(file), begin, 1 if begin == 0 else None):
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
        """How many documents; with a separator, all text is looked through."""
        if self.separator is None:
            return sum(len(piece.files) for piece in self.pieces())
        mark = self.separator.encode()
        return sum(raw.count(mark) + 1 for piece in self.pieces() for _, _, raw in self._bytes(piece))


class JsonLinesSource(Source):
    """.jsonl files (also .json and .ndjson, .gz, .zst): one JSON object a line, the text under `column`."""

    def pieces(self) -> list[Piece]:
        """Byte ranges of the files; InputError for a file that is one array."""
        for file in self.files:
            if not file.name.endswith(LINES[:2]):  # .json may be either
                with open_bytes(file) as stream:
                    if stream.read(64).lstrip()[:1] == b"[":
                        raise InputError(f"{file} is one JSON array; write an object a line: jq -c '.[]' {file} > {file.stem}.jsonl")
        return [piece for file in self.files for piece in byte_ranges(file, content_size(file), self.piece_bytes)]

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The text of each line, or whole rows; malformed lines as Bad."""
        file = str(self.file(piece))
        with opened(self.file(piece), piece) as stream:
            offset, line = first_line(stream, piece), 1 if piece.start == 0 else None
            while offset is not None and offset <= piece.stop:
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
        if self.whole_rows and isinstance(row, dict):
            return Record(row, file, line, offset)
        if not isinstance(row, dict) or self.column not in row:
            have = ", ".join(list(row)[:8]) if isinstance(row, dict) else type(row).__name__
            talk = isinstance(row, dict) and ("preferences are trained on with --objective dpo" if "chosen" in row else
                                              "conversations are trained on with --objective sft, which prepares them itself" if {"messages", "conversations", "completion"} & set(row) else "")  # fmt: skip
            return Bad(file, line, offset, f"no key {self.column!r} (there is: {have}); {talk or 'set --data.text_column'}")
        return text_of(row[self.column], file, line, offset, self.column)

    def count(self) -> int:
        """Lines of all files."""
        return count_lines(self.files)


def count_lines(files: Sequence[AnyPath]) -> int:
    """Line ends of files, up to a million and what the last 16 MB hold: the rule it serves asks only for a hundred."""
    total = 0
    for file in files:
        with open_bytes(file) as stream:
            while total < 1_000_000 and (block := stream.read(1 << 24)):
                total += block.count(b"\n")
    return total


def opened(file: AnyPath, piece: Piece) -> AbstractContextManager[BinaryIO]:
    """A file to read a piece of. A plain one is closed again, a compressed one stays open for the next piece; of a remote one the
    piece is fetched at once, with what a last line may reach beyond it."""
    if file.suffix in COMPRESSED:
        return nullcontext(reopened(file))
    if isinstance(file, RemotePath):
        return file.window(piece.start, piece.stop + PART_BYTES)
    return file.open("rb")


def text_of(value: Any, file: str, line: int | None, offset: int, column: str) -> Document | Bad:
    """A value of a column as a document; Bad where it is no text that UTF-8 can hold."""
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
        """Says which id ends a document."""
        self.eos_id = eos_id

    def pieces(self) -> list[Piece]:
        """One for each file."""
        return [Piece((str(file),)) for file in self.files]

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The ids of each document, end included."""
        file = self.file(piece)
        if (size := size_of(file)) % 2:
            yield Bad(str(file), None, size - 1, "an odd number of bytes cannot hold uint16 ids")
            return
        ids = np.asarray(mapped(file, np.dtype("<u2")))
        ends = np.flatnonzero(ids == self.eos_id) if self.eos_id is not None else np.zeros(0, dtype=np.int64)
        start = 0
        for end in [*ends.tolist(), len(ids)]:
            if end > start:
                yield np.asarray(ids[start:end], dtype=np.int32)
            start = end + 1

    def count(self) -> int:
        """Files: their documents are counted when they are read."""
        return len(self.files)


class WrappedSource(Source):
    """Base of sources that read another one: all of it, as it stands, where a subclass says nothing else."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.files, source.column, source.separator)
        self.source, self.piece_bytes = source, source.piece_bytes

    def signature(self) -> dict[str, str]:
        """That of the source inside."""
        return self.source.signature()

    def size(self) -> int:
        """That of the source inside."""
        return self.source.size()

    def ended_by(self, eos_id: int) -> None:
        """Handed to the source inside."""
        self.source.ended_by(eos_id)

    def pieces(self) -> list[Piece]:
        """Those of the source inside."""
        self.source.piece_bytes = self.piece_bytes
        return self.source.pieces()

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The documents of the source inside."""
        return self.source.read(piece)

    def count(self) -> int:
        """That of the source inside."""
        return self.source.count()


class FirstDocuments(WrappedSource):
    """The first `limit` documents of another source; malformed ones are passed on and not counted."""

    def __init__(self, source: Source, limit: int) -> None:
        super().__init__(source)
        self.limit = limit
        self._share: dict[Piece, int] = {}

    def ended_by(self, eos_id: int) -> None:
        """Handed to the source inside; what was counted is counted again."""
        super().ended_by(eos_id)
        if isinstance(self.source, TokenFileSource):  # it has other documents now
            self._share = {}

    def identity(self) -> str:
        """A hash of the limit and of the source inside."""
        return hashlib.sha256(f"first {self.limit} of {self.source.identity()}".encode()).hexdigest()

    def pieces(self) -> list[Piece]:
        """Pieces of the source inside, up to the one that holds the last document."""
        if not self._share or self.source.piece_bytes != self.piece_bytes:  # read once here: nobody else knows how many documents a piece holds
            left, self._share = self.limit, {}
            for piece in super().pieces():
                if left == 0:
                    break
                good = sum(1 for _ in islice((d for d in self.source.read(piece) if not isinstance(d, Bad)), left))
                self._share[piece], left = good, left - good
        return list(self._share)

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """Documents of a piece until the limit is reached."""
        self.pieces()
        left = self._share[piece]
        for document in self.source.read(piece):
            if left == 0:
                return
            left -= not isinstance(document, Bad)
            yield document

    def count(self) -> int:
        """At most the limit."""
        return min(self.limit, self.source.count())


def open_source(
    path: str | Path, column: str = "text", separator: str | None = None, limit: int | None = None, cache: PartCache | None = None
) -> Source:
    """The source at a path or URL: a file by its suffix, a folder of files of one suffix, or by name a bundled corpus or a data set
    of the hub; of all, the first `limit` documents. cache: of what is read from URLs.

    Raises InputError when there is nothing, or nothing readable, there.
    """
    if str(path) in HUB and not Path(path).exists():
        return SOURCES.get("huggingface")(HUB[str(path)], None, "train", column, limit)
    found = _source_at(path, column, separator, cache)
    return found if limit is None else FirstDocuments(found, limit)


def _source_at(place: str | Path, column: str, separator: str | None, cache: PartCache | None) -> Source:
    if str(place) in BUNDLED and not Path(place).exists():
        file = Path(__file__).parent.parent / "corpus" / BUNDLED[str(place)]
        return SOURCES.get(KINDS[kind_of(file)])([file], column, separator)
    path = path_of(place, cache)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a file or folder of {', '.join(SUFFIXES)}, or "
                         f"{', '.join([*BUNDLED, *HUB])}")  # fmt: skip
    if path.is_file():
        files: Sequence[AnyPath] = [path]
    else:
        inside: Sequence[AnyPath] = path.files() if isinstance(path, RemotePath) else [f for f in path.rglob("*") if f.is_file()]
        files = sorted(f for f in inside if kind_of(f) in KINDS)
        if not files:
            raise InputError(f"{path} holds no {', '.join(SUFFIXES)} file")
    kinds = {kind_of(f) for f in files}
    if len(kinds) > 1:
        raise ConfigError(f"{path} mixes {', '.join(sorted(map(str, kinds)))}; give one kind, or a list of paths in data.path")
    if all(size_of(f) == 0 for f in files):
        raise InputError(f"{path} is empty; there is nothing to train on")
    kind = kinds.pop()
    if kind not in KINDS:
        raise InputError(f"{path}: {kind or 'a file without suffix'} is not read; give {', '.join(SUFFIXES)}")
    return SOURCES.get(KINDS[kind])(files, column, separator)


def kind_of(file: AnyPath) -> str:
    """The suffix that says what a file holds, without that of its compression."""
    *_, inner, last = ["", "", *file.suffixes]
    kind = inner if last in (*COMPRESSED, ".xz") and inner in (".txt", ".csv", *LINES) else last
    return ".jsonl" if kind in LINES else kind
