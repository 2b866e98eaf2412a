"""A source whose documents go through transforms; nobody who reads it knows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from treadle.data import remembered
from treadle.data.deduplication import Deduplication
from treadle.data.documents import Bad, Document
from treadle.data.generated_texts import THIS_PROCESS, GeneratedTexts
from treadle.data.sources import Piece, Source, WrappedSource
from treadle.data.transforms import Texts, Transform
from treadle.errors import ConfigError
from treadle.files import cache_root

UNKNOWN = "unknown"  # stands for the fingerprint of a function that has none


class TransformedSource(WrappedSource):
    """The documents of `source` after `transforms`. together: all sources of one data set, in order, among which a document is a
    duplicate of another."""

    def __init__(self, source: Source, transforms: Sequence[Transform], cache_dir: str | None = None) -> None:
        super().__init__(source)
        self.transforms, self.cache_dir = list(transforms), cache_dir
        self.together: list[TransformedSource] = [self]
        self._decisions: dict[int, str] = {}  # number of a de-duplication -> the file with what it leaves out

    # ---- what it is ----

    def table(self) -> dict[str, str]:
        """Fingerprints by name, in order, with what tells them from files."""
        table = {f"{t.label()} (transform {n})": f"{remembered.FUNCTION}{t.fingerprint() or UNKNOWN}" for n, t in enumerate(self.transforms, 1)}
        if isinstance(self.source, GeneratedTexts):  # last: the first entries are the transforms
            table[f"{self.source.label()} (source)"] = f"{remembered.FUNCTION}{self.source.fingerprint() or UNKNOWN}"
        return table

    def without_fingerprint(self) -> list[str]:
        """Labels of the functions whose source is unknown; their results cannot be kept for another process."""
        made: list[Transform | GeneratedTexts] = [*self.transforms]
        made += [self.source] if isinstance(self.source, GeneratedTexts) else []
        return [one.label() for one in made if one.fingerprint() is None]

    def identity(self) -> str:
        """A hash of the source inside and of all transforms."""
        mark = THIS_PROCESS if self.without_fingerprint() else ""
        others = [one.source.identity() for one in self.together] if self._deduplications() else []
        text = json.dumps([self.source.identity(), list(self.table().values()), mark, others])
        return hashlib.sha256(text.encode()).hexdigest()

    def signature(self) -> dict[str, str]:
        """That of the source inside, and the transforms' fingerprints."""
        return super().signature() | self.table()

    # ---- reading ----

    def pieces(self) -> list[Piece]:
        """Those of the source inside, once duplicates are decided on."""
        for number in self._deduplications():
            self._decide(number)
        return super().pieces()

    def read(self, piece: Piece) -> Iterator[Document | Bad]:
        """The documents of a piece after all transforms."""
        return self.read_until(piece, len(self.transforms))

    def read_until(self, piece: Piece, end: int) -> Texts:
        """The documents after the first `end` transforms."""

        def malformed(ordinal: int, reason: str) -> Bad:
            return Bad(piece.files[0] if piece.files else "the data", None, max(0, piece.start), f"document {ordinal + 1} from there: {reason}")

        texts = self._only_text(piece)
        for number, transform in enumerate(self.transforms[:end]):
            if isinstance(transform, Deduplication):
                texts = transform.without(texts, self._decide(number), self._place(), piece)
            else:
                texts = transform.apply(texts, malformed)
        return texts

    def _only_text(self, piece: Piece) -> Texts:
        for document in self.source.read(piece):
            if not isinstance(document, (str, Bad)):
                raise ConfigError("transforms and filters read text, and these documents are token ids; leave data.transforms and "
                                  "data.filters away, or give the text")  # fmt: skip
            yield document

    # ---- de-duplication ----

    def _deduplications(self) -> list[int]:
        return [number for number, transform in enumerate(self.transforms) if isinstance(transform, Deduplication)]

    def _place(self) -> int:
        return next(number for number, one in enumerate(self.together) if one is self)

    def _decide(self, number: int) -> str:
        """The file with what a de-duplication leaves out, made where it is not there."""
        if number not in self._decisions:
            transform = self.transforms[number]
            assert isinstance(transform, Deduplication)
            asked = [[one.source.identity(), one.piece_bytes] for one in self.together]
            mark = THIS_PROCESS if self.without_fingerprint() else ""
            name = hashlib.sha256(json.dumps([asked, list(self.table().values())[: number + 1], mark]).encode()).hexdigest()[:24]
            file = cache_root(self.cache_dir) / "duplicates" / f"{name}.sqlite"

            def documents() -> Iterator[tuple[int, Piece, Texts]]:
                for place, one in enumerate(self.together):
                    for piece in WrappedSource.pieces(one):  # without the decisions that are being made
                        yield place, piece, one.read_until(piece, number)

            transform.decide(file, documents)
            self._decisions[number] = str(file)
        return self._decisions[number]

    def remarks(self) -> list[str]:
        """What de-duplication has left out, a line each."""
        found = []
        for number, file in self._decisions.items():
            transform = self.transforms[number]
            assert isinstance(transform, Deduplication)
            found.append(transform.said(file))
        return found


def transformed(sources: Sequence[Source], transforms: Sequence[Transform], cache_dir: str | None = None, always: bool = False) -> list[Source]:
    """These sources, each behind the transforms; duplicates are looked for among all of them. always: without transforms too."""
    if not transforms and not always:
        return list(sources)
    made = [TransformedSource(source, transforms, cache_dir) for source in sources]
    for one in made:
        one.together = made
    return list(made)


def as_those(sources: Sequence[Source], other: Source) -> Source:
    """`other` (a text to validate on) behind the transforms of these, de-duplicated by itself."""
    first = sources[0] if sources else None
    return TransformedSource(other, first.transforms, first.cache_dir) if isinstance(first, TransformedSource) else other


@dataclass
class Shaped:
    """What a data set's documents went through. functions: fingerprints by name. unknown: those that have none."""

    functions: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    folder: Path | None = None

    @staticmethod
    def of(sources: Sequence[Source], root: Path) -> Shaped:
        """What these sources went through; nothing where they are as they were."""
        if not sources or not isinstance(first := sources[0], TransformedSource):
            return Shaped()
        every = first.together
        table = {name: what for one in every for name, what in one.table().items()}
        unknown = list(dict.fromkeys(name for one in every for name in one.without_fingerprint()))
        return Shaped(table, unknown, first.remarks(), root / "functions")

    def remark(self) -> str:
        """The remarks as the end of a sentence."""
        return "".join(f"; {line}" for line in self.remarks)

    def keep(self, fingerprint: str) -> None:
        """Writes the functions down under the fingerprint of what was prepared with them."""
        if self.folder is not None and self.functions:
            remembered.keep(self.folder, fingerprint, self.functions)

    def difference(self, fingerprint: str) -> str:
        """Which functions are others than those of the data with this fingerprint."""
        return "" if self.folder is None else remembered.difference(self.folder, fingerprint, self.functions)
