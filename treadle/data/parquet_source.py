"""Parquet files: the text is in one column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from treadle.data.documents import Bad, Document, Record
from treadle.data.sources import FEWEST_PARTS, PIECE_BYTES, Piece, Source, text_of
from treadle.errors import DataError, InputError, MissingExtra
from treadle.storage.remote import AnyPath, RemotePath

PART_BYTES = 8 << 20  # of a row group, which is decoded for each of its parts: 8 MB take longer to tokenise than 100 to decode


class ParquetSource(Source):
    """.parquet files, read by row group; the text is in `column`."""

    @staticmethod
    def _open(file: AnyPath) -> Any:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise MissingExtra("reading .parquet files", "parquet") from None
        try:
            return parquet.ParquetFile(file.open() if isinstance(file, RemotePath) else file)
        except DataError:
            raise
        except Exception as problem:  # pyarrow's own error classes
            raise DataError(f"{file}: not a readable parquet file ({problem})") from None

    def pieces(self) -> list[Piece]:
        """One for each row group; InputError for a file without the column."""
        found = []
        for file in self.files:
            opened = self._open(file)
            names = opened.schema_arrow.names
            if self.column not in names and not self.whole_rows:
                raise InputError(f"{file} has no column {self.column!r} (there is: {', '.join(names)}); set "
                                 "--data.text_column")  # fmt: skip
            for group in range(opened.num_row_groups):
                parts = 1
                if self.piece_bytes < PIECE_BYTES:
                    parts = max(1, opened.metadata.row_group(group).total_byte_size // PART_BYTES, -(-FEWEST_PARTS // opened.num_row_groups))
                found += [Piece((str(file),), group, group + 1, part, parts) for part in range(parts)]
        return found

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The text of each row of a group, or whole rows."""
        file = str(self.file(piece))
        try:
            group = self._open(self.file(piece)).read_row_group(piece.start, columns=None if self.whole_rows else [self.column])
            values = group.to_pylist() if self.whole_rows else group.column(0).to_pylist()
        except DataError:
            raise
        except Exception as problem:
            yield Bad(file, None, 0, f"row group {piece.start} cannot be read ({problem})")
            return
        for row in range(piece.part, len(values), piece.parts):
            yield Record(values[row], file, row, 0) if self.whole_rows else text_of(values[row], file, row, 0, self.column)

    def count(self) -> int:
        """Rows of all files."""
        return sum(self._open(file).metadata.num_rows for file in self.files)
