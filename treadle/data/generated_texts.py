"""Texts that a function of the user's gives, as a source: windows of them, by the number of the document."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from treadle.data.documents import Bad, Document
from treadle.data.sources import Piece, Source, text_of
from treadle.data.transforms import function_fingerprint, function_label
from treadle.errors import ConfigError, DataError

THIS_PROCESS = os.urandom(8).hex()  # what an unknown function gives is for nobody else


class GeneratedTexts(Source):
    """function() -> the texts, the same ones each time. It runs once to count them. To begin anywhere else than at the beginning it
    runs again and its texts are passed over, unless it takes `start`, the number of the first document that is wanted."""

    def __init__(self, function: Callable[..., Iterable[str]], version: str | int | None = None, limit: int | None = None) -> None:
        super().__init__([])
        self.function, self.version, self.limit = function, version, limit
        self.begins_anywhere = "start" in inspect.signature(function).parameters
        self._source = f"version {version}" if version is not None else function_fingerprint(function)
        self._lengths: array[int] | None = None  # bytes of each document
        self._open: tuple[int, Iterator[Any]] | None = None  # the number of the next document, and where it comes from

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("each worker would run the function again")  # so that prepare reads it in this process

    def label(self) -> str:
        """The function's name."""
        return function_label(self.function)

    def fingerprint(self) -> str | None:
        """A hash of the function's source, or its version; None where neither is known."""
        return self._source

    def identity(self) -> str:
        """A hash of the function and the limit; of this process where the function has none."""
        text = json.dumps(["texts", self._source or THIS_PROCESS + str(id(self)), self.limit])
        return hashlib.sha256(text.encode()).hexdigest()

    def signature(self) -> dict[str, str]:
        """Nothing: there is no file that may change."""
        return {}  # its fingerprint stands among those of the transforms

    def _counted(self) -> array[int]:
        if self._lengths is None:
            self._lengths = array("Q")
            for text in self._from(0):
                self._lengths.append(len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0)
        return self._lengths

    def size(self) -> int:
        """Bytes of all texts, counted in a first run through them."""
        return sum(self._counted())

    def count(self) -> int:
        """How many texts there are."""
        return len(self._counted())

    def pieces(self) -> list[Piece]:
        """Ranges of texts of about piece_bytes."""
        starts, held = [0], 0
        for number, size in enumerate(self._counted()):
            if held and held + size > self.piece_bytes:
                starts.append(number)
                held = 0
            held += size
        return [Piece((), a, b) for a, b in zip(starts, [*starts[1:], self.count()]) if b > a]

    def _from(self, start: int) -> Iterator[Any]:
        try:
            made = iter(self.function(start=start) if self.begins_anywhere else self.function())
            made = made if self.begins_anywhere else islice(made, start, None)
            yield from made if self.limit is None else islice(made, max(0, self.limit - start))
        except Exception as problem:  # whatever a user's function raises
            raise DataError(f"{self.label()} raised {type(problem).__name__}: {problem}") from problem

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The texts of a piece; DataError when there are fewer than there were."""
        at, texts = self._open or (-1, iter(()))
        if at != piece.start:
            texts = self._from(piece.start)
        self._open = None
        for number in range(piece.start, piece.stop):
            try:
                text = next(texts)
            except StopIteration:
                raise DataError(f"{self.label()} ended after {number} texts and had given {self.count()} before; it has to give the same ones "
                                "each time") from None  # fmt: skip
            yield text_of(text, self.label(), number, 0, "its text")
        self._open = piece.stop, texts


def generated_texts(function: Any, streaming: bool, version: str | int | None, limit: int | None) -> GeneratedTexts:
    """ConfigError where a stream could begin nowhere."""
    made = GeneratedTexts(function, version, limit)
    if streaming and not made.begins_anywhere:
        raise ConfigError(f"a stream begins anywhere, and {made.label()} only at its beginning: let it take `start: int`, the number of the "
                          "first document that is wanted, or leave streaming away")  # fmt: skip
    return made
