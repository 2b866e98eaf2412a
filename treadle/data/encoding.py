"""Documents -> ids, many at a time: what preparing and streaming share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from treadle.data.documents import Bad, Document, Encoded
from treadle.errors import DataError
from treadle.text.base import Tokenizer

ENCODE_CHARACTERS = 1 << 16  # long documents are encoded in parts, so that the encoder's threads share them
PLACES_KEPT = 20  # malformed documents of a piece or block that are named
PENDING = 64 << 20  # characters encoded at once: bounds memory


def parts_of(text: str, size: int = ENCODE_CHARACTERS) -> list[str]:
    """A long text in parts, cut only between a line end and a letter with a letter before the line end.

    There a byte-level tokenizer's words end anyway, so the ids of the parts are the ids of the whole. A text without
    such a place stays whole.
    """
    parts, start = [], 0
    while len(text) - start > size:
        found = re.compile(r"(?<=\S\n)(?=\S)").search(text, start + size)
        if found is None:
            break
        parts.append(text[start : found.start()])
        start = found.start()
    return [*parts, text[start:]]


def scored_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int64 [V + 100]: bytes of each token; the label -100 (nothing is scored) as an index finds the 0 behind them. A look-up
    without a mask is what counting costs least by: with one it was 13% of reading a stream."""
    return np.concatenate([np.asarray(tokenizer.byte_lengths, dtype=np.int64), np.zeros(100, dtype=np.int64)])


@dataclass
class LeftOut:
    """Malformed documents: how many, and where the first of them are."""

    count: int = 0
    places: list[str] = field(default_factory=list)


def well_formed(documents: Iterable[Document | Bad], on_bad: str, left_out: LeftOut) -> Iterator[tuple[int, Document]]:
    """(place among all, document) of those that are not malformed; the others are counted, or with on_bad="error" a DataError,
    as those are which end the reading whatever on_bad is."""
    for ordinal, document in enumerate(documents):
        if not isinstance(document, Bad):
            yield ordinal, document
            continue
        if document.ends:
            raise DataError(f"{document}; mend the row, or take it out of the file")
        if on_bad == "error":
            raise DataError(f"{document}; mend it, or go on without it: --data.on_bad skip")
        left_out.count += 1
        if len(left_out.places) < PLACES_KEPT:
            left_out.places.append(str(document))


class Encoder:
    """Takes documents one after another and holds their ids, each ended by the end-of-document token.

    ids: arrays to be joined. lengths: ids of each document. short: documents left out for fewer than min_length tokens. bytes: of all
    the text.
    """

    def __init__(self, tokenizer: Tokenizer, min_length: int = 0) -> None:
        self.tokenizer, self.min_length = tokenizer, min_length
        self.ids: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.masks: list[np.ndarray] = []  # of Encoded documents
        self.short = self.bytes = 0
        self._parts: list[str] = []
        self._counts: list[int] = []  # parts of each pending document
        self._pending = 0
        self._eos = np.array([tokenizer.eos_id], dtype=np.int32)

    def add(self, document: Document, file: str) -> None:
        """DataError for ids (of `file`) outside the vocabulary."""
        if isinstance(document, Encoded):  # ends as it was made to end
            self.bytes += int(self.tokenizer.byte_lengths[document.ids].sum())
            if len(document) < self.min_length:
                self.short += 1
                return
            self.ids.append(document.ids)
            self.masks.append(document.learnt)
            self.lengths += document.lengths
            return
        if isinstance(document, np.ndarray):
            if int(document.max(initial=0)) >= self.tokenizer.vocab_size:
                raise DataError(
                    f"{file}: id {int(document.max())} is outside the tokenizer's {self.tokenizer.vocab_size} "
                    "tokens; name the tokenizer that made it: --tokenizer.name PATH"
                )
            self.flush()
            self.bytes += int(self.tokenizer.byte_lengths[document].sum())
            self._keep(document)
            return
        assert isinstance(document, str)
        self.bytes += len(document.encode())
        cut = parts_of(document)
        self._parts += cut
        self._counts.append(len(cut))
        self._pending += len(document)
        if self._pending > PENDING:
            self.flush()

    def flush(self) -> None:
        """Encodes what is pending."""
        encoded, at = self.tokenizer.encode_batch(self._parts) if self._parts else [], 0
        for count in self._counts:
            self._keep(np.concatenate(encoded[at : at + count]))
            at += count
        self._parts, self._counts, self._pending = [], [], 0

    def joined(self) -> np.ndarray:
        """All ids, int32 [N]."""
        return np.concatenate(self.ids) if self.ids else np.zeros(0, dtype=np.int32)

    def _keep(self, document: np.ndarray) -> None:
        if len(document) == 0:
            return
        if len(document) < self.min_length:
            self.short += 1
            return
        self.ids += [document, self._eos]
        self.lengths.append(len(document) + 1)
