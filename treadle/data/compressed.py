"""Files read from any place, compressed ones too: what lets a stream begin in the middle.

.gz: one pass finds places to begin at (about every 1 MB, 32 kB each, by the package indexed_gzip), kept in the cache. .zst: a file
of several frames begins at any of them; one of a single large frame cannot begin anywhere, and a copy of it in frames of 1 MB is
kept in the cache. Other files are opened as they are.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from treadle.errors import DataError, MissingExtra
from treadle.files import cache_root, write_atomically
from treadle.storage.filesystems import State
from treadle.storage.remote import AnyPath, size_of, state_of_file

COMPRESSED = (".gz", ".zst")
SPACING = 1 << 20  # bytes of content between two places to begin at
LARGEST_FRAME = 16 << 20  # a frame is decompressed whole
READ = 1 << 20


def open_bytes(path: AnyPath) -> BinaryIO:
    """The content of a file, decompressed, as a stream that seeks in O(1)."""
    if path.suffix == ".gz":
        return _gzip(path)
    if path.suffix == ".zst":
        table = _frames(path)
        return io.BufferedReader(_Frames(path if table["file"] == str(path) else Path(table["file"]), table["frames"]), READ)
    return path.open("rb")


def content_size(path: AnyPath) -> int:
    """Bytes of the content, decompressed."""
    if path.suffix not in COMPRESSED:
        return size_of(path)
    known = _kept(path, ".size")
    if not known.is_file():
        if path.suffix == ".zst":
            size = _frames(path)["size"]
        else:
            with open_bytes(path) as stream:
                size = stream.seek(0, os.SEEK_END)
        write_atomically(known, json.dumps(size).encode())
    return int(json.loads(known.read_text()))


def _kept(path: AnyPath, suffix: str) -> Path:
    """Where the cache keeps what was found out about a file as it is now."""
    now = state_of_file(path)
    name = hashlib.sha256(json.dumps([str(path.resolve()), now.size, now.version]).encode()).hexdigest()[:24]
    folder = cache_root(None) / "seek"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (name + suffix)


def _gzip(path: AnyPath) -> BinaryIO:
    try:
        import indexed_gzip
    except ImportError:
        raise MissingExtra(f"reading {path.name} from any place", "compressed") from None
    index = _kept(path, ".gzidx")
    try:
        if not index.is_file():
            with indexed_gzip.IndexedGzipFile(**_given(path), spacing=SPACING) as whole:
                whole.build_full_index()
                _check_gzip(path, whole.seek(0, os.SEEK_END))
                made = io.BytesIO()
                whole.export_index(fileobj=made)
            write_atomically(index, made.getvalue())
        return indexed_gzip.IndexedGzipFile(**_given(path), index_file=str(index))
    except (OSError, EOFError, indexed_gzip.ZranError) as problem:
        raise DataError(f"{path}: not a readable .gz file ({problem}); test it with `gzip -t {path}`") from None


def _given(path: AnyPath) -> dict[str, Any]:
    """How indexed_gzip is told what to read: it opens files of this machine faster by itself."""
    return {"filename": str(path)} if isinstance(path, Path) else {"fileobj": path.open()}


def _check_gzip(path: AnyPath, size: int) -> None:
    """EOFError where the file was cut, which the index does not notice. The last four bytes are the size of the last member; where
    that is not all of the content, there are several members, and only reading them all tells."""
    with path.open("rb") as stream:
        stream.seek(-4, os.SEEK_END)
        if int.from_bytes(stream.read(4), "little") == size % (1 << 32):
            return
        stream.seek(0)
        data = stream.read(READ)
        while data:
            member = zlib.decompressobj(wbits=31)
            while not member.eof:
                if not data and not (data := stream.read(READ)):
                    raise EOFError("it ends in the middle")
                try:
                    member.decompress(data)
                except zlib.error as problem:
                    raise EOFError(str(problem)) from None
                data = member.unused_data
            data = (data or stream.read(READ)).lstrip(b"\0")


def _zstandard(path: AnyPath) -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingExtra(f"reading {path.name}", "compressed") from None
    return zstandard


def _frames(path: AnyPath) -> dict[str, Any]:
    """{"file": the file or its copy in frames, "size": bytes of content, "frames": [[place, place in the content], ...]}."""
    kept = _kept(path, ".zstidx")
    if kept.is_file():
        found = json.loads(kept.read_text())
        if found["file"] == str(path) or Path(found["file"]).is_file():
            return found
    zstandard = _zstandard(path)
    try:
        frames, size, largest = _walk(path, zstandard)
        file: AnyPath = path
        if largest > LARGEST_FRAME:
            file = copy = _kept(path, ".frames.zst")
            frames = _copied(path, copy, zstandard)
    except zstandard.ZstdError as problem:
        raise DataError(f"{path}: not a readable .zst file ({problem}); test it with `zstd -t {path}`") from None
    found = {"file": str(file), "size": size, "frames": frames}
    write_atomically(kept, json.dumps(found).encode())
    return found


def _walk(path: AnyPath, zstandard: Any) -> tuple[list[list[int]], int, int]:
    """(frames, bytes of content, of the largest frame)."""
    frames, size, largest, at, data = [], 0, 0, 0, b""
    with path.open("rb") as stream:
        while data or (data := stream.read(READ)):
            frames.append([at, size])
            frame, begun = zstandard.ZstdDecompressor().decompressobj(), size
            while True:
                size += len(frame.decompress(data))
                if frame.eof:
                    at += len(data) - len(frame.unused_data)
                    data = frame.unused_data
                    break
                at += len(data)
                data = stream.read(READ)
                if not data:
                    raise zstandard.ZstdError(f"it ends in the middle of a frame, after {size} bytes of content")
            largest = max(largest, size - begun)
    return frames, size, largest


def _copied(path: AnyPath, file: Path, zstandard: Any) -> list[list[int]]:
    """The content again, in frames of SPACING bytes; where they begin."""
    frames, at, size = [], 0, 0
    part, pack = file.with_suffix(f".part-{os.getpid()}"), zstandard.ZstdCompressor(level=3)
    with path.open("rb") as stream, part.open("wb") as copy:
        reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        while content := b"".join(_exactly(reader, SPACING)):
            frames.append([at, size])
            at, size = at + copy.write(pack.compress(content)), size + len(content)
    part.replace(file)
    return frames


def _exactly(reader: Any, count: int) -> Iterator[bytes]:
    while count > 0 and (data := reader.read(count)):
        count -= len(data)
        yield data


class _Frames(io.RawIOBase):
    """A .zst file of small frames; one is held, decompressed."""

    def __init__(self, path: AnyPath, frames: list[list[int]]) -> None:
        self.path, self.places, self.starts = path, [f[0] for f in frames], [f[1] for f in frames]
        self.stream, self.held, self.content, self.at = path.open("rb"), -1, b"", 0

    def _load(self, number: int) -> None:
        if number != self.held:
            end = self.places[number + 1] if number + 1 < len(self.places) else size_of(self.path)
            self.stream.seek(self.places[number])
            data = self.stream.read(end - self.places[number])
            self.content, self.held = _zstandard(self.path).ZstdDecompressor().decompressobj().decompress(data), number

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            self._load(len(self.starts) - 1)
            offset += self.starts[-1] + len(self.content)
        elif whence == os.SEEK_CUR:
            offset += self.at
        self.at = offset
        return offset

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        number = bisect_right(self.starts, self.at) - 1
        while 0 <= number < len(self.starts):
            self._load(number)
            part = self.content[self.at - self.starts[number] :][: len(buffer)]
            if part:
                buffer[: len(part)] = part
                self.at += len(part)
                return len(part)
            number += 1  # an empty frame, or the end
        return 0

    def close(self) -> None:
        self.stream.close()
        super().close()


@functools.lru_cache(maxsize=1)
def _open_last(file: AnyPath, now: State) -> BinaryIO:
    return open_bytes(file)


def reopened(file: AnyPath) -> BinaryIO:
    """`open_bytes`, kept open for the next call of this process: an index of a large .gz takes longer to load than a block."""
    return _open_last(file, state_of_file(file))
