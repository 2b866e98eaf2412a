"""What a source gives: text, ids, whole rows, ids with a mask, and what is malformed in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Bad:
    """A malformed document: where it is and what is wrong with it. ends: it is an error however many are allowed."""

    file: str
    line: int | None
    offset: int
    reason: str
    ends: bool = False

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line is not None else ""
        return f"{self.file}{line}, byte {self.offset}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """A row of .jsonl or .parquet as it is, and where it stands; from a source with whole_rows."""

    table: dict[str, Any]
    file: str
    line: int | None
    offset: int

    def bad(self, reason: str, ends: bool = False) -> Bad:
        """The row as malformed, for this reason. ends: it is an error however many are allowed."""
        return Bad(self.file, self.line, self.offset, reason, ends)

    def __len__(self) -> int:
        return len(self.table)


@dataclass
class Encoded:
    """Tokens with a mask: ids int32 [N], learnt bool [N] (whether a token is learnt), `lengths` of the documents in them, which stay
    side by side. Without ids it is left out. remark: what people should know, counted by its text."""

    ids: np.ndarray
    learnt: np.ndarray
    lengths: tuple[int, ...]
    remark: str = ""

    @staticmethod
    def left_out(remark: str) -> Encoded:
        """No tokens, and why."""
        return Encoded(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool), (), remark)

    def __len__(self) -> int:
        return len(self.ids)


Document = str | np.ndarray | Record | Encoded  # text, the ids of an already tokenised document, a whole row, ids with a mask
