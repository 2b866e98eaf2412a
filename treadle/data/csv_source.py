"""Comma- (or tab-) separated values: the text is in one column."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from treadle.data.compressed import content_size, open_bytes
from treadle.data.documents import Bad, Document
from treadle.data.sources import Piece, Source, count_lines, opened, text_of
from treadle.errors import InputError
from treadle.storage.remote import AnyPath

csv.field_size_limit(1 << 30)


class CsvSource(Source):
    """.csv files (also .gz, .zst) with a header line; a field in quotes may hold line ends.

    Whether a line end ends a row depends on all quotes before it, so a file is scanned for quotes once before it is cut.
    """

    def pieces(self) -> list[Piece]:
        """Byte ranges of the files, cut where rows end."""
        return [piece for file in self.files for piece in self._pieces(file)]

    def _pieces(self, file: AnyPath) -> list[Piece]:
        size = content_size(file)
        with open_bytes(file) as stream:
            header = stream.readline()
            self._column(header, str(file))
            starts, inside, at = [len(header)], False, len(header)
            while block := stream.read(self.piece_bytes):
                block += stream.readline()
                inside ^= bool(block.count(b'"') % 2)
                at += len(block)
                if not inside and at < size:
                    starts.append(at)
        return [Piece((str(file),), a, b) for a, b in zip(starts, [*starts[1:], size]) if a < b]

    def _column(self, header: bytes, file: str) -> int:
        names = next(csv.reader([header.decode("utf-8-sig", "replace")]), [])
        if self.column not in names:
            raise InputError(f"{file} has no column {self.column!r} (there is: {', '.join(names[:20])}); set --data.text_column")
        return names.index(self.column)

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """One document a row; malformed rows as Bad."""
        file = str(self.file(piece))
        with opened(self.file(piece), piece) as stream:
            stream.seek(0)
            column = self._column(stream.readline(), file)
            stream.seek(piece.start)
            raw = stream.read(piece.stop - piece.start)
        text = raw.decode("utf-8", "surrogateescape")  # a broken character makes one row bad, not all
        rows = csv.reader(io.StringIO(text, newline=""))
        while True:
            try:
                row = next(rows, None)
            except csv.Error as problem:
                yield Bad(file, rows.line_num, piece.start, str(problem))
                continue
            if row is None:
                return
            if not row:
                continue
            if len(row) <= column:
                yield Bad(file, None, piece.start, f"{len(row)} field(s) {rows.line_num} line(s) after that byte, and the text is in field {column + 1}")
                continue
            if not row[column].isascii() and any("\udc80" <= c <= "\udcff" for c in row[column]):
                yield Bad(file, None, piece.start, f"not UTF-8, {rows.line_num} line(s) after that byte; convert with `iconv -f latin1 -t utf-8`")
                continue
            yield text_of(row[column], file, None, piece.start, self.column)

    def count(self) -> int:
        """Lines of all files, about as many as documents."""
        return count_lines(self.files)
