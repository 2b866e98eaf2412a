"""Data sets of Hugging Face's `datasets` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from treadle.data.documents import Bad, Document, Record
from treadle.data.sources import FEWEST_PARTS, PIECE_BYTES, Piece, Source, text_of
from treadle.errors import InputError, MissingExtra


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
        if column and column not in self.rows.column_names:  # "" where whole rows are read
            raise InputError(f"data set {name!r} has no column {column!r} (there is: "
                             f"{', '.join(self.rows.column_names)}); set --data.text_column")  # fmt: skip
        super().__init__([], column)

    def identity(self) -> str:
        """A hash of name, configuration, split, column and the rows' fingerprint."""
        text = json.dumps(["hf", self.name, self.config, self.split, self.column, self.rows._fingerprint])
        return hashlib.sha256(text.encode()).hexdigest()

    def signature(self) -> dict[str, str]:
        """Name -> the fingerprint that `datasets` gives."""
        return {self.name: self.rows._fingerprint}

    def size(self) -> int:
        """Bytes of the data set, as `datasets` says."""
        return int(self.rows.dataset_size or 0)

    def pieces(self) -> list[Piece]:
        """Ranges of rows."""
        total, step = len(self.rows), self.ROWS
        if self.piece_bytes < PIECE_BYTES:
            step = max(1, min(step, total // FEWEST_PARTS, total * self.piece_bytes // max(1, self.size())))
        return [Piece((), a, min(a + step, total)) for a in range(0, total, step)]

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The text of each row of a piece, or whole rows."""
        if self.whole_rows:
            for number in range(piece.start, piece.stop):
                yield Record(self.rows[number], self.name, number, 0)
            return
        for row, value in enumerate(self.rows[piece.start : piece.stop][self.column]):
            yield text_of(value, self.name, piece.start + row, 0, self.column)

    def count(self) -> int:
        """Rows."""
        return len(self.rows)
