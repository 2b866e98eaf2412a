"""Leaving out documents that were there before: a pass over all of the text that decides, on disk, before anything is encoded.

The first of several equals, by position in the source, stays; so the result depends on no number of workers. What is left out is
written to one sqlite file under the cache directory, which the next start finds again. Memory stays at sqlite's page cache (2 MB) and
one piece of text, however many documents there are; on disk, while deciding: some 50 bytes a document (exact), or 4 bytes a
permutation and 30 a band (near: some 1.5 kB by default).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from treadle.data.documents import Bad
from treadle.data.sources import Piece
from treadle.data.transforms import Malformed, Texts, Transform
from treadle.errors import ConfigError

Documents = Callable[[], Iterator[tuple[int, Piece, Texts]]]  # -> number of the source, piece, its documents
RECALL = 0.99  # of pairs exactly at the threshold, the share that share a band
SEED = 0x9E3779B9


def normalised(text: str) -> str:
    """Without the white space around it, and with one space for each run of it inside."""
    return " ".join(text.split())


class Deduplication(Transform):
    """Base of both kinds."""

    def apply(self, texts: Texts, malformed: Malformed) -> Texts:
        raise NotImplementedError("it needs all of the text; TransformedSource calls decide() and without()")

    @abstractmethod
    def tables(self) -> str:
        """SQL that makes what is remembered of documents."""

    @abstractmethod
    def is_new(self, text: str, number: int, seen: sqlite3.Connection) -> bool:
        """Whether no document like this one was seen; then it is remembered under `number`."""

    def decide(self, file: Path, documents: Documents) -> None:
        """Makes `file`, unless it is there."""
        if file.is_file():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits and then finds it
            if not file.is_file():
                self._decide(file, documents)

    def _decide(self, file: Path, documents: Documents) -> None:
        unfinished, work = file.with_suffix(".unfinished"), file.with_suffix(".work")
        for old in (unfinished, work):
            old.unlink(missing_ok=True)
        total = left_out = 0
        with _open(unfinished) as found, _open(work) as seen:
            found.execute("CREATE TABLE duplicate (source INTEGER, piece TEXT, ordinal INTEGER)")
            found.execute("CREATE TABLE counted (documents INTEGER, left_out INTEGER)")
            seen.executescript(self.tables())
            for source, piece, texts in documents():
                name = _name(piece)
                for ordinal, text in enumerate(texts):
                    if isinstance(text, Bad):
                        continue
                    if not self.is_new(text, total, seen):
                        found.execute("INSERT INTO duplicate VALUES (?, ?, ?)", (source, name, ordinal))
                        left_out += 1
                    total += 1
            found.execute("INSERT INTO counted VALUES (?, ?)", (total, left_out))
            found.execute("CREATE INDEX by_piece ON duplicate (source, piece)")
            found.commit()
        found.close()
        seen.close()
        work.unlink(missing_ok=True)
        os.replace(unfinished, file)

    def without(self, texts: Texts, file: str, source: int, piece: Piece) -> Texts:
        """These documents of a piece without those that `file` leaves out."""
        kept = _open(Path(file))  # for each piece anew: a connection does not survive a fork
        rows = kept.execute("SELECT ordinal FROM duplicate WHERE source = ? AND piece = ?", (source, _name(piece))).fetchall()
        kept.close()
        duplicates = {row[0] for row in rows}
        return (text for ordinal, text in enumerate(texts) if isinstance(text, Bad) or ordinal not in duplicates)

    def said(self, file: str) -> str:
        """What a finished pass left out, in words."""
        kept = _open(Path(file))
        documents, left_out = kept.execute("SELECT documents, left_out FROM counted").fetchone()
        kept.close()
        return f"{self.label()} left out {left_out:,} of {documents:,} documents"


def _open(file: Path) -> sqlite3.Connection:
    made = sqlite3.connect(file)
    made.execute("PRAGMA synchronous = OFF")  # a file that was cut off is made again
    made.execute("PRAGMA journal_mode = OFF")
    return made


def _name(piece: Piece) -> str:
    files = hashlib.sha256("\n".join(piece.files).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{files}:{piece.start}:{piece.stop}:{piece.part}:{piece.parts}"


class ExactDeduplication(Deduplication):
    """Leaves out documents whose text, white space aside, was there before."""

    def fingerprint(self) -> str:
        return "ExactDeduplication:1"

    def tables(self) -> str:
        return "CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID"

    def is_new(self, text: str, number: int, seen: sqlite3.Connection) -> bool:
        digest = hashlib.blake2b(normalised(text).encode(), digest_size=16).digest()
        return seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1


class NearDeduplication(Deduplication):
    """Leaves out documents that share most of their n-grams of words with one that was kept (MinHash, Broder 1997, in bands).

    threshold: the Jaccard similarity from which two are the same, as estimated from `permutations` hashes (with 128 of them the
    estimate of .8 has a standard deviation of .035). n_gram: words.
    """

    def __init__(self, threshold: float = 0.8, n_gram: int = 5, permutations: int = 128) -> None:
        if not 0 < threshold <= 1 or n_gram < 1 or permutations < 16:
            raise ConfigError("NearDeduplication: threshold is above 0 and at most 1, n_gram 1 or more, permutations 16 or more")
        self.threshold, self.n_gram, self.permutations = threshold, n_gram, permutations
        self.rows = next(r for r in range(permutations, 0, -1) if r == 1 or 1 - (1 - threshold**r) ** (permutations // r) >= RECALL)
        dice = np.random.Generator(np.random.Philox(SEED))
        self._factors = dice.integers(0, 2**64, permutations, dtype=np.uint64) | np.uint64(1)
        self._terms = dice.integers(0, 2**64, permutations, dtype=np.uint64)

    def fingerprint(self) -> str:
        return f"NearDeduplication:1:{self.threshold}:{self.n_gram}:{self.permutations}"

    def tables(self) -> str:
        return ("CREATE TABLE signature (document INTEGER PRIMARY KEY, hashes BLOB);"
                "CREATE TABLE band (hash INTEGER, document INTEGER, PRIMARY KEY (hash, document)) WITHOUT ROWID")  # fmt: skip

    def signature(self, text: str) -> np.ndarray:
        """uint32 [permutations]: two texts agree in about as many places as their similarity says."""
        words = text.lower().split()
        grams = {" ".join(words[i : i + self.n_gram]) for i in range(max(1, len(words) - self.n_gram + 1))}
        hashes = np.frombuffer(b"".join(hashlib.blake2b(g.encode(), digest_size=8).digest() for g in grams), "<u8")
        smallest = np.full(self.permutations, 0xFFFFFFFF, dtype=np.uint32)
        for start in range(0, len(hashes), 4096):  # a long document a part at a time: 4096 x 128 numbers of 8 bytes are 4 MB
            part = hashes[start : start + 4096, None] * self._factors + self._terms  # [n, permutations], modulo 2^64
            smallest = np.minimum(smallest, (part >> np.uint64(32)).min(0).astype(np.uint32))
        return smallest

    def is_new(self, text: str, number: int, seen: sqlite3.Connection) -> bool:
        own = self.signature(text)
        bands = []
        for band in range(self.permutations // self.rows):
            some = own[band * self.rows : (band + 1) * self.rows].tobytes()
            bands.append(int.from_bytes(hashlib.blake2b(bytes([band % 256]) + some, digest_size=8).digest(), "big", signed=True))
        checked: set[int] = set()
        for hashed in bands:
            for (other,) in seen.execute("SELECT document FROM band WHERE hash = ?", (hashed,)).fetchall():
                if other in checked:
                    continue
                checked.add(other)
                (stored,) = seen.execute("SELECT hashes FROM signature WHERE document = ?", (other,)).fetchone()
                if float(np.mean(np.frombuffer(stored, np.uint32) == own)) >= self.threshold:
                    return False
        seen.execute("INSERT INTO signature VALUES (?, ?)", (number, own.tobytes()))
        seen.executemany("INSERT OR IGNORE INTO band VALUES (?, ?)", [(hashed, number) for hashed in bands])
        return True
