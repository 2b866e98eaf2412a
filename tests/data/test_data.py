"""Order, packing, preparation, batches and the loader: every row once, nothing leaks, nothing is lost."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_text
from treadle.data import packing
from treadle.data.base import BatchPlan
from treadle.data.batch import IGNORE, PAD, Batch
from treadle.data.dataset import TokenDataset as Dataset
from treadle.data.dataset import load_splits
from treadle.data.encoding import parts_of
from treadle.data.loader import Loader
from treadle.data.prepare import prepare
from treadle.data.settings import DataSettings
from treadle.data.sources import Bad, open_source
from treadle.errors import DataError, InputError
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings

MODES = ["concat", "next_fit", "first_fit", "best_fit", "none"]


# ---- packing ----


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(2, 128), st.sampled_from(MODES[1:]))
@settings(max_examples=150, deadline=None)
def test_every_token_is_packed_exactly_once(lengths: list[int], row_length: int, mode: str) -> None:
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    total = sum(lengths)
    plan = packing.plan(mode, starts, total, row_length)
    seen = np.zeros(total, dtype=int)
    for s, n in zip(plan.start.tolist(), plan.length.tolist()):
        seen[s : s + n] += 1
        owner = np.searchsorted(starts, s, side="right") - 1
        assert s + n <= starts[owner] + lengths[owner]  # a segment stays inside its document
        assert lengths[owner] > row_length or n == lengths[owner]  # and is cut only when it must be
    assert (seen == 1).all()
    for r in range(plan.rows):
        assert plan.length[plan.row_starts[r] : plan.row_starts[r + 1]].sum() <= row_length


def test_packing_efficiency() -> None:
    """lognormal(4.8, .8) lengths in rows of 512: the figures of docs/data.md, to a percent."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.8, 0.8, 20_000), 1, None).astype(int)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    filled = {m: packing.plan(m, starts, int(lengths.sum()), 512).efficiency(512) for m in MODES[1:]}
    assert filled["none"] < 0.4 < 0.78 < filled["next_fit"] < 0.82 < 0.98 < filled["first_fit"] < filled["best_fit"]
    assert filled["best_fit"] > 0.999


# ---- sources and preparation ----


def byte_set(path: Path, root: Path, **options: object):  # type: ignore[no-untyped-def]
    return prepare(open_source(path), Tokenizer.load("byte"), root=root, **{"held": (0.0, 0.0), **options})  # type: ignore[arg-type]


def test_parts_have_the_ids_of_the_whole(own_cache: Path) -> None:
    text = make_text(3000)
    parts = parts_of(text, 1000)
    assert len(parts) > 50 and "".join(parts) == text
    tokenizer = Tokenizer.train("bpe", iter([text]), 400)
    assert np.array_equal(np.concatenate([tokenizer.encode(p) for p in parts]), tokenizer.encode(text))


@pytest.mark.parametrize("kind", ["txt", "separator", "folder", "jsonl", "parquet", "bin"])
def test_every_source_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    documents = [f"Document {n}.\nIt has two lines, and é.\n" for n in range(5)]
    separator = None
    if kind == "txt":
        documents = ["".join(documents)]
        path = tmp_path / "a.txt"
        path.write_text(documents[0])
    elif kind == "separator":
        path, separator = tmp_path / "a.txt", "<|endoftext|>"
        path.write_text("<|endoftext|>\n".join(documents))
    elif kind == "folder":
        path = tmp_path / "texts"
        path.mkdir()
        for n, text in enumerate(documents):
            (path / f"{n}.txt").write_text(text)
    elif kind == "jsonl":
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": d}, ensure_ascii=n % 2 == 0) for n, d in enumerate(documents)))
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        import pyarrow

        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=2)
    else:
        path = tmp_path / "a.bin"
        ids = [i for d in documents for i in [*d.encode(), 255]]
        np.array(ids, dtype="<u2").tofile(path)
    tokenizer = Tokenizer.load("byte")
    source = open_source(path, separator=separator)
    tokens = prepare(source, tokenizer, root=tmp_path / "cache", held=(0.0, 0.0))["train"]
    found = [tokens.document(n) for n in range(tokens.documents())]
    assert [tokenizer.decode(d.tolist()) for d in found] == documents
    assert all(d[-1] == 255 for d in found)  # one end-of-document token each
    assert tokens.statistics["bytes"] == sum(len(d.encode()) for d in documents)
    tokens.verify()


def test_jsonl_pieces_cover_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.data.sources.Source.piece_bytes", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * (n % 300 + 1)}) for n in range(200)) + "\n")
    source = open_source(path)
    pieces = source.pieces()
    assert len(pieces) > 10
    assert [len(d) for p in pieces for d in source.read(p)] == [n % 300 + 1 for n in range(200)]


@pytest.mark.parametrize("separator", [None, "END"])
def test_a_large_text_is_read_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str | None) -> None:
    """Nothing is lost or doubled where ranges meet, and no document is cut where a separator says where it ends."""
    monkeypatch.setattr("treadle.data.sources.Source.piece_bytes", 3000)
    documents = [make_text(3 + n % 9, seed=n) + "é\n" for n in range(60)]
    path = tmp_path / "a.txt"
    path.write_text("END\n".join(documents))
    source = open_source(path, separator=separator)
    pieces = source.pieces()
    read = [d for p in pieces for d in source.read(p)]
    assert len(pieces) > 5 and all(isinstance(d, str) for d in read)
    if separator:
        assert read == documents
    else:
        assert "".join(map(str, read)) == path.read_text() and all(str(d).endswith("\n") for d in read)
    (tmp_path / "small.txt").write_text("small\n")
    folder = open_source(tmp_path)
    assert sum(len(str(d)) for p in folder.pieces() for d in folder.read(p)) >= len(path.read_text()) - 4 * 60


def test_preparation_continues_and_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between pieces, it goes on; the result is that of one go. A cut or damaged shard is named."""
    monkeypatch.setattr("treadle.data.sources.Source.piece_bytes", 2000)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": make_text(4, seed=n)}) for n in range(60)) + "\n")
    whole = byte_set(path, tmp_path / "one")["train"]

    class Killed(Exception):
        pass

    import treadle.data.prepare as module

    real, done = module.prepare_piece, []

    def dies(job: module.PieceJob, tokenizer: object = None) -> object:
        if len(done) == 3:
            raise Killed
        done.append(job.number)
        return real(job, tokenizer)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "prepare_piece", dies)
    with pytest.raises(Killed):
        byte_set(path, tmp_path / "two")
    rest: list[int] = []
    monkeypatch.setattr(module, "prepare_piece", lambda job, t=None: (rest.append(job.number), real(job, t))[1])
    again = byte_set(path, tmp_path / "two")["train"]
    assert rest and not set(rest) & set(done)
    assert again.fingerprint == whole.fingerprint
    shard = next(again.folder.glob("shard-*.bin"))
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        again.verify()
    shard.write_bytes(data[:-3])
    with pytest.raises(DataError, match=r"bytes where dataset\.json says"):
        byte_set(path, tmp_path / "two")
    shard.unlink()
    with pytest.raises(DataError, match=r"missing.*--fresh"):
        byte_set(path, tmp_path / "two")
    assert byte_set(path, tmp_path / "two", fresh=True)["train"].fingerprint == whole.fingerprint


def test_parallel_preparation_gives_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.data.sources.Source.piece_bytes", 20_000)
    monkeypatch.setattr("treadle.data.prepare.PARALLEL_FROM", 1)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": make_text(4, seed=n)}) for n in range(300)) + "\n")
    one, two = byte_set(path, tmp_path / "one", workers=1), byte_set(path, tmp_path / "two", workers=2)
    assert one["train"].fingerprint == two["train"].fingerprint and len(one["train"].shards) > 2


def test_held_out_text_is_the_end_or_whole_documents(tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    text = make_text(500)
    few.write_text(text)
    sets = byte_set(few, tmp_path / "c", held=(0.1, 0.0))
    parts = [bytes(sets[s].document(0)[:-1].astype(np.uint8)).decode() for s in ("train", "validation")]
    assert "".join(parts) == text and 0.08 < len(parts[1]) / len(text) < 0.12 and parts[0].endswith("\n")
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(json.dumps({"text": f"document number {n}"}) for n in range(1000)))
    sets = byte_set(many, tmp_path / "c", held=(0.1, 0.0))
    assert sets["train"].documents() + sets["validation"].documents() == 1000
    assert 60 < sets["validation"].documents() < 140
    names = [{sets[s].document(n).tobytes() for n in range(sets[s].documents())} for s in sets]
    assert not names[0] & names[1]


def test_short_and_empty_documents_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in ["", "ab", "a long enough document", ""]))
    s = byte_set(path, tmp_path / "c", min_length=5)["train"].statistics
    assert (s["documents"], s["empty"], s["shorter_than_min_length"]) == (1, 2, 1)


def test_missing_column_and_mixed_kinds(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"no column 'text' \(there is: body\)"):
        open_source(tmp_path / "a.parquet").pieces()
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(Exception, match="mixes"):
        open_source(tmp_path)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_jsonl_bytes_give_documents_or_bad_records(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Whatever a file holds, reading it yields text or a Bad that names a place inside it; it never raises."""
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(data + b"\n")
    source = open_source(path)
    for piece in source.pieces():
        for document in source.read(piece):
            if isinstance(document, Bad):
                assert document.reason and 0 <= document.offset <= len(data) + 1
            else:
                assert isinstance(document, str)
                document.encode()


# ---- batches ----


def documents_dataset(tmp_path: Path, mode: str, lengths: list[int], row: int = 16) -> Dataset:
    path = tmp_path / "d.jsonl"
    text = "abcdefghijklmnopqrstuvwxyz" * 9
    path.write_text("\n".join(json.dumps({"text": text[n % 26 :][:size]}) for n, size in enumerate(lengths)))
    return Dataset([byte_set(path, tmp_path / "c")["train"]], Tokenizer.load("byte"), row, mode)


@pytest.mark.parametrize("mode", MODES)
def test_each_transition_is_trained_once_and_none_crosses_documents(tmp_path: Path, mode: str) -> None:
    lengths = [1, 5, 40, 7, 15, 16, 17, 3, 33, 2]
    data = documents_dataset(tmp_path, mode, lengths)
    tokens = data.sets[0]
    want = Counter()
    for n in range(tokens.documents()):
        ids = tokens.document(n).tolist()
        want.update(itertools.pairwise(ids))
    got: Counter = Counter()
    for batch in data.in_sequence(3):
        assert batch.labels is not None and batch.doc_ids is not None and batch.position_ids is not None
        scored = batch.labels != IGNORE
        got.update(zip(batch.input_ids[scored].tolist(), batch.labels[scored].tolist()))
        assert not scored[batch.doc_ids == PAD].any()
        for r, runs in enumerate(batch.segments or ()):
            assert sum(map(abs, runs)) == 16
            at = 0
            for d, run in enumerate(runs):
                inside = slice(at, at + abs(run))
                expected = d if run > 0 else PAD
                assert (batch.doc_ids[r, inside] == expected).all()
                if run > 0:
                    assert batch.position_ids[r, inside].tolist() == list(range(run))
                at += abs(run)
        assert batch.counts["labels"] == int(scored.sum())
    assert got == want


def test_surplus_rows_score_nothing(tmp_path: Path) -> None:
    data = documents_dataset(tmp_path, "concat", [50])
    batch = data.batch(np.array([0, 0]), np.array([0, -1]))
    assert batch.counts == {"bytes": 16, "labels": 16, "tokens": 16, "rows": 1, "documents": 1}
    assert (batch.doc_ids[1] == PAD).all()  # type: ignore[index]


def test_batches_by_hand() -> None:
    batch = Batch.for_training([[1, 2, 3, 4, 0]], doc_ids=[[0, 0, 1, 1, -1]])
    assert batch.labels is not None and batch.labels.tolist() == [[2, -100, 4, -100, -100]]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 0, 1, 0]]
    assert batch.segments == ((2, 2, -1),) and batch.counts["documents"] == 2
    assert Batch.from_ids([1, 2, 3]).labels is None and Batch.from_ids([1, 2, 3]).shape == (1, 3)
    with pytest.raises(Exception, match="labels is"):
        Batch.from_ids([[1, 2]], labels=[[1]])


# ---- loader ----


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_is_the_function_of_the_step(tmp_path: Path, workers: int) -> None:
    data = documents_dataset(tmp_path, "best_fit", [9, 30, 12, 5, 77, 8, 3, 14] * 5)
    plan = BatchPlan(3, 6, accumulation=3, steps=7, workers=workers, prefetch=2)
    read = data.step_reader(0, plan)
    loader = Loader(data, 4, plan)
    positions = []
    for micro, position in loader:
        assert len(micro) == 3 and micro[0].shape == (2, 16)
        for got, want in zip(micro, read(position - 1)):
            assert torch.equal(got.input_ids, want.input_ids) and got.counts == want.counts
        positions.append(position)
    loader.close()
    assert positions == list(range(5, 12)) and loader.steps == 7


def test_an_error_in_the_data_thread_reaches_the_step(tmp_path: Path) -> None:
    data = documents_dataset(tmp_path, "concat", [300])
    data.parts[0].row = lambda number: 1 / 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        list(Loader(data, 0, BatchPlan(0, 2, steps=5)))


def test_load_splits_caches_and_reports(text_file: Path, own_cache: Path) -> None:
    splits = load_splits(DataSettings(path=str(text_file), seq_len=32), TokenizerSettings(name="bpe", vocab_size=300))
    stats = splits["train"].stats()
    assert (
        stats["bytes_per_token"] > 1.5 and stats["packing_efficiency"] > 0.99 and stats["rows"] == len(splits["train"])
    )
    again = load_splits(DataSettings(path=str(text_file), seq_len=32), TokenizerSettings(name="bpe", vocab_size=300))
    assert again["train"].fingerprint() == splits["train"].fingerprint()
    assert again["train"].tokenizer.fingerprint() == splits["train"].tokenizer.fingerprint()
    assert splits["validation"].fingerprint() != splits["train"].fingerprint()


def test_hugging_face_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hf (datasets) is not installed")
    documents = [f"story {n}" for n in range(20)]
    datasets.Dataset.from_dict({"story": documents}).save_to_disk(str(tmp_path / "set"))
    wanted = DataSettings(dataset_name=str(tmp_path / "set"), text_column="story", seq_len=8, validation_fraction=0.0)
    data = load_splits(wanted, TokenizerSettings(name="byte"))["train"]
    assert [data.tokenizer.decode(data.sets[0].document(n).tolist()) for n in range(20)] == documents


def test_three_parts_that_share_no_document(tmp_path: Path) -> None:
    many = tmp_path / "a.jsonl"
    many.write_text("".join(json.dumps({"text": f"story number {n}"}) + "\n" for n in range(400)))
    sets = byte_set(many, tmp_path / "c", held=(0.1, 0.2))
    told = {name: {tuple(tokens.document(n).tolist()) for n in range(tokens.documents())} for name, tokens in sets.items()}
    assert set(told) == {"train", "validation", "test"} and sum(map(len, told.values())) == 400
    assert not (told["train"] & told["test"] or told["validation"] & told["test"] or told["train"] & told["validation"])
    assert 20 < len(told["validation"]) < 65 and 50 < len(told["test"]) < 115
    assert byte_set(many, tmp_path / "c", held=(0.1, 0.0))["validation"].documents() == len(told["validation"])
    one = tmp_path / "b.txt"
    one.write_text("".join(f"line {n} of one text\n" for n in range(500)))
    parts = byte_set(one, tmp_path / "c", held=(0.1, 0.1))
    text = "".join(Tokenizer.load("byte").decode(parts[name].document(0).tolist()) for name in ("train", "validation", "test"))
    assert text == one.read_text()


@pytest.mark.parametrize("kind", ["jsonl", "txt", "bin"])
def test_the_first_documents_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.data.sources.Source.piece_bytes", 64)  # several pieces
    path = tmp_path / f"a.{kind}"
    documents = [f"document {n}" for n in range(30)]
    if kind == "jsonl":
        path.write_text("not json\n" + "".join(json.dumps({"text": d}) + "\n" for d in documents))
    elif kind == "txt":
        path.write_text("\n---\n".join(documents))
    else:
        np.array([i for d in documents for i in [*d.encode(), 255]], dtype="<u2").tofile(path)
    wanted = DataSettings(path=str(path), seq_len=8, validation_fraction=0.0, max_samples=17, document_separator="---")
    data = load_splits(wanted, TokenizerSettings(name="byte"))["train"]
    decoded = [data.tokenizer.decode(data.sets[0].document(n).tolist()).strip() for n in range(data.sets[0].documents())]
    assert decoded == documents[:17] and data.sets[0].statistics["malformed"] == (kind == "jsonl")


def test_tinystories_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is not asked: what the library is told to fetch, and what comes of it or of its absence."""
    datasets = pytest.importorskip("datasets", reason="the extra hf (datasets) is not installed")
    asked = []

    def load_dataset(name: str, config: object, split: str, streaming: bool = False):  # type: ignore[no-untyped-def]
        asked.append((name, split, streaming))
        if len(asked) > 1:
            raise ConnectionError("no route to the hub")
        return datasets.Dataset.from_dict({"text": [f"Once upon a time {n}." for n in range(50)]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    wanted = DataSettings(path="tinystories", max_samples=20, seq_len=16, validation_fraction=0.0)
    data = load_splits(wanted, TokenizerSettings(name="byte"))["train"]
    assert asked == [("roneneldan/TinyStories", "train", True)] and data.sets[0].documents() == 20
    with pytest.raises(InputError, match=r"no route to the hub\. Without a connection, give local text"):
        open_source("tinystories")


def test_the_bundled_corpus_is_the_documented_text() -> None:
    import hashlib
    import lzma

    folder = Path(__file__).parents[2] / "treadle" / "corpus"
    text = lzma.decompress((folder / "austen.txt.xz").read_bytes())
    assert len(text) == 4_025_023
    assert hashlib.sha256(text).hexdigest() in (folder / "LICENCE.md").read_text()
    (document,) = (d for p in open_source("austen").pieces() for d in open_source("austen").read(p))
    assert isinstance(document, str) and document.encode() == text


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    np.array([1, 2, 300, 4], dtype="<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"id 300 is outside the tokenizer's 256 tokens; .* --tokenizer\.name"):
        byte_set(tmp_path / "a.bin", tmp_path / "c")
