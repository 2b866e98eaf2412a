"""Text -> prepared tokens, once: in parallel, restartable, held-out text split off, every file checksummed.

Each piece of the source becomes one shard of each split, recorded when it is durable; a second run skips what is
recorded. The finished folder is named by what went in, so the same text and tokenizer are never encoded twice.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np

from treadle import trusted_code
from treadle.data.documents import Document, Encoded
from treadle.data.encoding import PLACES_KEPT, Encoder, LeftOut, parts_of, well_formed
from treadle.data.order import key
from treadle.data.shards import DATASET_FILE, SCHEMA, TokenSet, file_sha256, id_type
from treadle.data.sources import Piece, Source
from treadle.errors import ConfigError, DataError, InputError
from treadle.files import alone, write_atomically
from treadle.storage.remote import AnyPath, RemotePath, path_of
from treadle.text.base import TRAINABLE, Tokenizer

SPLITS = ("train", "validation", "test")
WHOLE_DOCUMENTS_FROM = 100  # with fewer documents, holding out whole ones would be a lottery
Held = tuple[float, float]  # shares held out for validation and for a test
PARALLEL_FROM = 64 << 20  # bytes; below, starting processes costs more than it saves
ALWAYS_TOLERATED = 10  # malformed lines that a small file may hold before bad_limit counts
SHARDED_FILE = "made-in-shards"  # marks a folder that several processes fill

Progress = Callable[[int, int], None]  # pieces done, pieces in all


@dataclass
class Split:
    """How documents are divided: a share of whole documents (by hash), or the end of each document."""

    held: Held
    whole_documents: bool

    @staticmethod
    def of(source: Source, held: Held) -> Split:
        """Whole documents where there are enough of them, else the end of each."""
        return Split(held, sum(held) > 0 and (source.indivisible or source.count() >= WHOLE_DOCUMENTS_FROM))

    def divide(self, document: Document, piece: int, ordinal: int) -> Iterator[tuple[str, Document]]:
        """(split, part) of one document; `piece` and `ordinal` identify it for the hash."""
        validation, test = self.held
        if validation + test == 0 or (not self.whole_documents and len(document) < 200):
            yield "train", document
        elif self.whole_documents:
            drawn = key(0x5B117, piece, ordinal) / 2**64
            yield ("validation" if drawn < validation else "test" if drawn < validation + test else "train"), document
        else:
            assert isinstance(document, (str, np.ndarray))
            first = _cut_point(document, int(len(document) * (1 - validation - test)))
            second = max(first, _cut_point(document, int(len(document) * (1 - test)))) if test else len(document)
            yield "train", document[:first]
            yield "validation", document[first:second]
            yield "test", document[second:]


def _cut_point(document: str | np.ndarray, at: int) -> int:
    """The first line end (else space) at or after `at`, so that no word is cut."""
    if isinstance(document, np.ndarray):
        return at
    for mark in ("\n", " "):
        found = document.find(mark, at)
        if 0 <= found < len(document) - 1:
            return found + 1
    return at


@dataclass
class PieceJob:
    """Everything one worker needs; crosses process borders."""

    number: int
    piece: Piece
    source: Source
    tokenizer_folder: str
    folder: str
    split: Split
    min_length: int
    on_bad: str


@dataclass
class PieceRecord:
    """What one piece gave; written beside its shards when they are durable."""

    number: int
    documents: int = 0
    empty: int = 0
    short: int = 0
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    bad: int = 0
    ledger: list[str] = field(default_factory=list)
    remarks: dict[str, int] = field(default_factory=dict)  # what documents brought to say, counted


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"piece-{number:05d}.json"


def prepare_piece(job: PieceJob, tokenizer: Tokenizer | None = None) -> PieceRecord:
    """Reads, divides and encodes one piece, and writes its shards and its record."""
    tokenizer = tokenizer or Tokenizer.load(job.tokenizer_folder)
    record = PieceRecord(job.number)
    encoders = {split: Encoder(tokenizer, job.min_length) for split in SPLITS}
    left_out = LeftOut()
    for ordinal, document in well_formed(job.source.read(job.piece), job.on_bad, left_out):
        if isinstance(document, Encoded) and document.remark:
            record.remarks[document.remark] = record.remarks.get(document.remark, 0) + 1
        if len(document) == 0:
            record.empty += not isinstance(document, Encoded)
            continue
        record.documents += 1
        for split, part in job.split.divide(document, job.number, ordinal):
            encoders[split].add(part, job.piece.files[0] if job.piece.files else "")
    record.bad, record.ledger = left_out.count, left_out.places
    for split, encoder in encoders.items():
        encoder.flush()
        record.bytes[split] = encoder.bytes
        record.short += encoder.short
        _write_shard(Path(job.folder) / split, job.number, record, split, encoder)
    write_atomically(_record_path(Path(job.folder), job.number), json.dumps(asdict(record)).encode())
    return record


def _write_shard(folder: Path, number: int, record: PieceRecord, split: str, encoder: Encoder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name, joined = f"shard-{number:05d}.bin", encoder.joined()
    write_atomically(folder / name, joined.astype(id_type(encoder.tokenizer.vocab_size)).tobytes())
    index, names = name.replace(".bin", ".idx"), [name, name.replace(".bin", ".idx")]
    write_atomically(folder / index, np.asarray(encoder.lengths, dtype="<i8").tobytes())
    if encoder.masks:
        names.append(name.replace(".bin", ".mask"))
        write_atomically(folder / names[-1], np.concatenate(encoder.masks).astype(np.uint8).tobytes())
    record.shards[split] = {
        "file": name,
        "ids": len(joined),
        "documents": len(encoder.lengths),
        "sha256": {n: file_sha256(folder / n) for n in names},
        **({"masked": True} if encoder.masks else {}),
    }


def _folder_lock(folder: Path) -> AbstractContextManager[None]:
    """One preparation of a folder at a time; a second process waits and then finds the work done."""
    return alone(folder.with_name(folder.name + ".lock"))


def _named(held: Held) -> Any:
    """In the names of folders: without a test the one share, as they were named before there was one."""
    return held if held[1] else held[0]


def _asked(
    source: Source, tokenizer: Tokenizer, held: Held, min_length: int, root: Path, output: Path | None
) -> tuple[str, Path]:
    """(everything that decides the contents, the folder for it)."""
    asked = json.dumps([SCHEMA, source.identity(), tokenizer.fingerprint(), _named(held), min_length])
    return asked, output or root / "data" / hashlib.sha256(asked.encode()).hexdigest()[:24]


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    *,
    root: Path,
    held: Held = (0.05, 0.0),
    min_length: int = 0,
    on_bad: str = "skip",
    bad_limit: float = 0.001,
    workers: int | str = "auto",
    progress: Progress | None = None,
    fresh: bool = False,
    output: Path | None = None,
) -> dict[str, TokenSet]:
    """Prepares a source and returns its token sets by split ('validation' only when something is held out).

    Raises DataError with file, line and byte offset when more than `bad_limit` of the documents are malformed (or any,
    with on_bad="error"), InputError when no document is left.
    """
    asked, folder = _asked(source, tokenizer, held, min_length, root, output)
    with _folder_lock(folder):
        if fresh and folder.exists():
            shutil.rmtree(folder)
        if not (folder / DATASET_FILE).is_file():
            _prepare_into(folder, asked, source, tokenizer, held, min_length, on_bad, workers, progress)
    _check_bad(folder, on_bad, bad_limit)
    return open_prepared(folder)


def open_prepared(folder: AnyPath) -> dict[str, TokenSet]:
    """The token sets of a folder that `prepare` made."""
    sets = {split: TokenSet.load(folder / split) for split in SPLITS if (folder / split / DATASET_FILE).is_file()}
    return {split: tokens for split, tokens in sets.items() if split == "train" or tokens.tokens() > 0}


def is_prepared(path: str | Path) -> bool:
    """Whether a folder holds prepared tokens."""
    found = path_of(path)
    if isinstance(found, RemotePath) and found.suffix:  # a file: nothing is asked for over the network
        return False
    return (found / "train" / DATASET_FILE).is_file()


def _prepare_into(
    folder: Path, asked: str, source: Source, tokenizer: Tokenizer, held: Held, min_length: int, on_bad: str,
    workers: int | str, progress: Progress | None,
) -> None:  # fmt: skip
    _begin(folder, asked, source, tokenizer)
    jobs, found = _jobs(folder, source, held, min_length, on_bad)
    _run(jobs, source, tokenizer, workers, progress, done=len(found))
    for number in found:  # written by an earlier run, or on another machine
        _verify_piece(folder, _read_record(folder, number))
    records = [_read_record(folder, n) for n in range(len(jobs) + len(found))]
    _finish(folder, records, tokenizer, Split.of(source, held))


def _begin(folder: Path, asked: str, source: Source, tokenizer: Tokenizer, keep: bool = False) -> None:
    """The folder with what was asked and the tokenizer. Pieces of other text are removed, or refused where several
    processes share the folder (`keep`)."""
    folder.mkdir(parents=True, exist_ok=True)
    asked_path = folder / "asked.json"
    if not asked_path.is_file() or asked_path.read_text(encoding="utf-8") != asked:
        stale = sorted(folder.glob("piece-*.json"))
        if stale and (keep or (folder / SHARDED_FILE).is_file()):
            raise ConfigError(f"{folder} holds pieces of other text, or made with another tokenizer or options; give every "
                              "shard the same ones, or write to a new folder with --output")  # fmt: skip
        for path in stale:  # an output folder reused for other text
            path.unlink()
        write_atomically(asked_path, asked.encode())
    source.ended_by(tokenizer.eos_id)
    tokenizer.save(folder / "tokenizer")
    if keep:
        write_atomically(folder / SHARDED_FILE, b"")


def _jobs(
    folder: Path, source: Source, held: Held, min_length: int, on_bad: str
) -> tuple[list[PieceJob], list[int]]:
    """(pieces to do, numbers of those that are done)."""
    split = Split.of(source, held)
    jobs, found = [], []
    for number, piece in enumerate(source.pieces()):
        if _record_path(folder, number).is_file():
            found.append(number)
        else:
            jobs.append(PieceJob(number, piece, source, str(folder / "tokenizer"), str(folder), split, min_length, on_bad))
    return jobs, found


def _run(
    jobs: list[PieceJob], source: Source, tokenizer: Tokenizer, workers: int | str, progress: Progress | None, done: int
) -> None:
    total = done + len(jobs)
    if progress:
        progress(done, total)
    count = (os.cpu_count() or 1) if workers == "auto" else max(1, int(workers))
    if count > 1 and len(jobs) > 1 and source.size() > PARALLEL_FROM and _travels(jobs[0]):
        context = multiprocessing.get_context("spawn")  # the parent may already run torch's threads
        with ProcessPoolExecutor(
            min(count, len(jobs)), context, trusted_code.adopt, (trusted_code.share(),)
        ) as pool:
            futures = [pool.submit(prepare_piece, job) for job in jobs]
            for future in as_completed(futures):
                future.result()
                done += 1
                if progress:
                    progress(done, total)
    else:
        for job in jobs:
            prepare_piece(job, tokenizer)
            done += 1
            if progress:
                progress(done, total)


def _travels(job: PieceJob) -> bool:
    """Whether another process can be sent this: a lambda or a function of the program itself cannot, and runs here."""
    try:
        ForkingPickler.dumps(job)
    except Exception:  # whatever a user's object raises
        return False
    return True


def _read_record(folder: Path, number: int) -> PieceRecord:
    return PieceRecord(**json.loads(_record_path(folder, number).read_text(encoding="utf-8")))


def _verify_piece(folder: Path, record: PieceRecord) -> None:
    """DataError, and the piece's record set aside so that it is made again, when a file is not as it was written."""
    for split, shard in record.shards.items():
        for name, digest in shard["sha256"].items():
            path = folder / split / name
            if not path.is_file() or file_sha256(path) != digest:
                path_of_record = _record_path(folder, record.number)
                path_of_record.unlink(missing_ok=True)
                raise DataError(f"{path} is not what piece {record.number} wrote; run the same command again: it makes this "
                                "piece anew")  # fmt: skip


def parse_shard(text: str) -> tuple[int, int]:
    """ "3/8" -> (3, 8), counted from 0; ConfigError for anything else."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ConfigError(f"--shard {text!r}: write I/N with I from 0 to N-1, as in --shard 0/8")
    return int(number), int(count)


def prepare_shard(
    source: Source, tokenizer: Tokenizer, shard: tuple[int, int], *, root: Path, held: Held, min_length: int,
    on_bad: str, workers: int | str, progress: Progress | None, output: Path | None = None,
) -> tuple[Path, int, int]:  # fmt: skip
    """Makes the pieces that fall to one of several processes or machines (piece p belongs to shard p mod N); returns the
    folder, the pieces there and the pieces in all. `prepare` without a shard then verifies and joins them."""
    asked, folder = _asked(source, tokenizer, held, min_length, root, output)
    with _folder_lock(folder):
        _begin(folder, asked, source, tokenizer, keep=True)
    jobs, found = _jobs(folder, source, held, min_length, on_bad)
    number, count = shard
    mine = [job for job in jobs if job.number % count == number]
    _run(mine, source, tokenizer, workers, progress, done=len([n for n in found if n % count == number]))
    return folder, len(list(folder.glob("piece-*.json"))), len(jobs) + len(found)


def _check_bad(folder: Path, on_bad: str, bad_limit: float) -> None:
    """Refuses data with too many malformed documents; looked at on every use, since another use may allow more."""
    statistics = TokenSet.load(folder / "train").statistics
    bad, good, ledger = statistics["malformed"], statistics["well_formed"], statistics["malformed_first"]
    if bad and on_bad == "error":
        raise DataError(f"{ledger[0]}; mend it, or go on without it: --data.on_bad skip")
    if bad > max(ALWAYS_TOLERATED, bad_limit * (bad + good)):
        raise DataError(f"{bad} of {bad + good} documents are malformed; the first: {ledger[0]}; mend the file, or "
                        "allow more: --data.bad_limit 1")  # fmt: skip


def _finish(folder: Path, records: list[PieceRecord], tokenizer: Tokenizer, split: Split) -> None:
    """Writes each split's dataset.json, statistics included; the train split's last, since it marks completion."""
    for name in reversed(SPLITS):
        shards = [r.shards[name] for r in records]
        lengths = np.concatenate(
            [np.fromfile(folder / name / s["file"].replace(".bin", ".idx"), "<i8") for s in shards]
        )
        if name == "train" and len(lengths) == 0:
            first = next((place for r in records for place in r.ledger), None)
            remarks = "; ".join(f"{n} {remark}" for remark, n in sum((Counter(r.remarks) for r in records), Counter()).items())
            reason = f"the first problem: {first}" if first else remarks or "every document is empty or shorter than data.min_length"
            raise (DataError if first else InputError)(f"no text is left to train on; {reason}")
        digest = hashlib.sha256(json.dumps([s["sha256"] for s in shards], sort_keys=True).encode())
        statistics = {
            "documents": int(len(lengths)),
            "bytes": sum(r.bytes[name] for r in records),
            "tokens": int(lengths.sum()),
            "length_percentiles": {
                str(p): int(np.percentile(lengths, p)) if len(lengths) else 0 for p in (5, 25, 50, 75, 95, 100)
            },
            "empty": sum(r.empty for r in records),
            "shorter_than_min_length": sum(r.short for r in records),
            "well_formed": sum(r.documents for r in records),
            "malformed": sum(r.bad for r in records),
            "malformed_first": [place for r in records for place in r.ledger][:PLACES_KEPT],
            "remarks": {remark: sum(r.remarks.get(remark, 0) for r in records) for r in records for remark in r.remarks if name == "train"},
            "held_out": "whole documents" if split.whole_documents else "the end of each document",
        }
        described = {
            "schema": SCHEMA,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint(),
            "fingerprint": digest.hexdigest(),
            "statistics": statistics,
            "shards": shards,
        }
        write_atomically(folder / name / DATASET_FILE, json.dumps(described, indent=1).encode())
    write_atomically(folder / DATASET_FILE, json.dumps({"schema": SCHEMA, "splits": list(SPLITS)}).encode())


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer that goes with a text


def training_texts(source: Source, held: Held, limit: int) -> Iterator[str]:
    """The training part of a source's text, in parts, up to `limit` bytes."""
    split, read = Split.of(source, held), 0
    for number, piece in enumerate(source.pieces()):
        for ordinal, document in enumerate(source.read(piece)):
            if not isinstance(document, str):
                continue
            for name, part in split.divide(document, number, ordinal):
                for text in parts_of(str(part)) if name == "train" else []:
                    if read >= limit:
                        return
                    read += len(text.encode())
                    yield text


def tokenizer_for(
    source: Source, name: str, vocab_size: int, *, root: Path, held: Held = (0.05, 0.0), limit: int = 20_000_000
) -> Tokenizer:
    """The tokenizer a configuration asks for: loaded, or trained once on this source and kept."""
    if name == "auto":
        name = "byte" if source.size() < 200_000 else "bpe"
    if name.lower() not in TRAINABLE:
        return Tokenizer.load(name)
    asked = json.dumps([name.lower(), vocab_size, source.identity(), _named(held), limit])
    folder = root / "tokenizers" / hashlib.sha256(asked.encode()).hexdigest()[:24]
    with _folder_lock(folder):
        if not (folder / "complete").is_file():
            trained = Tokenizer.train(name, training_texts(source, held, limit), vocab_size)
            trained.save(folder)
            write_atomically(folder / "complete", b"")
    return Tokenizer.load(folder)
