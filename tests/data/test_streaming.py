"""Streams: the same rows for any number of processes and workers, every document once an epoch, exact resume, whatever the format."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from treadle.data.base import BatchPlan, Dataset
from treadle.data.compressed import content_size, open_bytes
from treadle.data.lanes import LANES, BlockOrder, groups_of
from treadle.data.sources import open_source
from treadle.errors import CheckpointError, ConfigError, DataError, InputError

DOCUMENTS = 3000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))


def texts(count: int = DOCUMENTS) -> list[str]:
    """Documents that say their own number, of 20 to 150 bytes."""
    dice = random.Random(0)
    return [f"{n:05d} " + "".join(dice.choices("abcdefgh \n", k=dice.randint(14, 144))) for n in range(count)]


def json_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts()))
    return tmp_path / "a.jsonl"


def stream(path: Any, **keys: Any) -> Any:
    keys = {"seq_len": 256, "packing": "best_fit", "validation_fraction": 0.0, **keys}
    return Dataset.load(path, tokenizer="byte", streaming=True, **keys)


def take(data: Any, count: int, position: Any = None, **plan: Any) -> tuple[list[list[Any]], list[Any]]:
    """(micro-batches of each step, the position after each)."""
    made = data.batches(data.start if position is None else position, BatchPlan(**{"seed": 3, "global_batch_size": 16, **plan}))
    steps = list(itertools.islice(made, count))
    made.close()
    return [batches for batches, _ in steps], [json.loads(json.dumps(position)) for _, position in steps]


def ids(steps: list[list[Any]]) -> list[list[list[int]]]:
    return [torch.cat([batch.input_ids for batch in step]).tolist() for step in steps]


def documents_in(data: Any, batches: list[list[Any]]) -> list[int]:
    """The numbers that the documents of these rows say, in order."""
    found = []
    for batch in itertools.chain.from_iterable(batches):
        for row, runs in zip(batch.input_ids, batch.segments):
            at = 0
            for run in runs:
                if run > 0:
                    found.append(int(data.tokenizer.decode(row[at : at + 5].tolist())))
                at += abs(run)
    return found


def one_epoch(data: Any, **plan: Any) -> list[int]:
    """The documents of each group until its first epoch is over, one group after another in rows."""
    numbers: list[int] = []
    made = data.batches(data.start, BatchPlan(**{"seed": 3, "global_batch_size": 16, **plan}))
    over: set[int] = set()
    for (batch,), position in made:
        cursors = position["cursors"][0]
        for group, (epoch, *_rest) in enumerate(cursors):
            if epoch == 0:
                numbers += documents_in(data, [[batch.rows(group, group + 1)]])
            else:
                over.add(group)
        if len(over) == len(cursors):
            return numbers
    raise AssertionError("unreachable")


def test_every_document_once_an_epoch_in_another_order_each_time(file: Path) -> None:
    data = stream(file)
    first = one_epoch(data)
    assert sorted(first) == list(range(DOCUMENTS))
    other = one_epoch(data, seed=4)
    assert sorted(other) == list(range(DOCUMENTS)) and other != first
    for order in (first, other):
        assert abs(np.corrcoef(np.arange(DOCUMENTS), order)[0, 1]) < 0.1
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


def test_an_epoch_ends_for_every_group_and_the_next_one_is_another(file: Path) -> None:
    data = stream(file)
    seen: dict[int, Counter[int]] = {0: Counter(), 1: Counter()}
    for (batch,), position in data.batches(data.start, BatchPlan(3, 16)):
        for group, (epoch, *_rest) in enumerate(position["cursors"][0]):
            if epoch in seen:
                seen[epoch].update(documents_in(data, [[batch.rows(group, group + 1)]]))
        if min(c[0] for c in position["cursors"][0]) >= 2:
            break
    assert set(seen[0]) == set(seen[1]) == set(range(DOCUMENTS))
    assert set(seen[0].values()) == set(seen[1].values()) == {1}
    assert list(seen[0]) != list(seen[1])
    assert any("epoch 2 begins" in line for line in data.news({}, BatchPlan())) and not data.news({}, BatchPlan())


@pytest.mark.parametrize("packing", ["concat", "next_fit", "none"])
def test_resume_is_exact_at_every_step_over_the_end_of_an_epoch(file: Path, packing: str) -> None:
    data = stream(file, packing=packing)
    whole, positions = take(data, 120)
    first_group = [position["cursors"][0][0] for position in positions]
    assert packing == "none" or (first_group[40][0] == 0 and first_group[117][0] >= 1)
    for at in (0, 7, 55, 117):
        again, _ = take(stream(file, packing=packing), 2, positions[at])
        assert ids(again) == ids(whole[at + 1 : at + 3])


def test_any_number_of_processes_and_workers_reads_the_same_rows(file: Path) -> None:
    data = stream(file)
    alone, positions = take(data, 30)
    for world in (2, 4, 8):
        shares = [take(data, 30, rank=rank, world_size=world, workers=2 * (world == 2 and rank == 0)) for rank in range(world)]
        for step in range(30):
            assert list(itertools.chain.from_iterable(ids(share)[step] for share, _ in shares)) == ids(alone)[step]
        joined = data.join([own[14] for _, own in shares])
        assert joined == positions[14]
        assert ids(take(data, 5, joined)[0]) == ids(alone[15:20])
    in_micro, _ = take(data, 5, accumulation=4)
    assert ids(in_micro) == ids(alone[:5]) and len(in_micro[0]) == 4


def test_what_was_fetched_ahead_is_not_in_the_position(file: Path) -> None:
    data = stream(file)
    made = data.batches(data.start, BatchPlan(3, 16, workers=2))
    first = [next(made) for _ in range(3)]
    made.close()
    alone, positions = take(data, 3)
    assert [p for _, p in first] == positions and ids([b for b, _ in first]) == ids(alone)


def test_lanes_deal_every_block_once() -> None:
    for blocks in (64, 100, 1000):
        order = BlockOrder(blocks, 5)
        for epoch in (0, 1):
            dealt = [order.block(epoch, lane, n) for lane in range(LANES) for n in range(order.count(lane))]
            assert sorted(dealt) == list(range(blocks))
        counts = [order.count(lane) for lane in range(LANES)]
        assert max(counts) - min(counts) <= 1
    few = BlockOrder(9, 5)
    for groups in (1, 2, 4, 8):
        lanes = LANES // groups
        assert all(sum(few.count(lane) for lane in range(g * lanes, (g + 1) * lanes)) for g in range(groups))


def test_processes_that_do_not_fit_are_told_which_do() -> None:
    assert groups_of(48, 8) == 16 and groups_of(256, 64) == 64
    with pytest.raises(ConfigError, match="1, 2, 4, 8, 16 can"):
        groups_of(48, 3)


@pytest.mark.parametrize("kind", ["jsonl.gz", "json.gz", "jsonl.zst", "frames.jsonl.zst", "csv", "csv.gz", "parquet", "txt"])
def test_every_format_gives_every_document(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, keys = tmp_path / f"data.{kind}", {}
    monkeypatch.setattr("treadle.data.compressed.LARGEST_FRAME", 1 << 16)
    if kind.startswith("json"):
        packed = _packed(json_lines(texts()), kind)
        path.write_bytes(packed)
    elif kind.startswith("frames"):
        lines = json_lines(texts())
        path.write_bytes(b"".join(_packed(lines[i : i + 30_000], kind) for i in range(0, len(lines), 30_000)))
    elif kind.startswith("csv"):
        with (tmp_path / "plain.csv").open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerows([["id", "text"], *([n, text + ' "quoted", and'] for n, text in enumerate(texts()))])
        path.write_bytes(_packed((tmp_path / "plain.csv").read_bytes(), kind))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.table({"text": texts()}), path, row_group_size=1000)
    else:
        path.write_text("\n<end>\n".join(t.replace("\n", " ") for t in texts()) + "\n")
        keys = {"document_separator": "<end>"}
    data = stream(path, **keys)
    assert sorted(one_epoch(data)) == list(range(DOCUMENTS))
    whole, positions = take(data, 40)
    assert ids(take(stream(path, **keys), 2, positions[30])[0]) == ids(whole[31:33])


def _packed(content: bytes, kind: str) -> bytes:
    if kind.endswith("gz"):
        return gzip.compress(content)
    if kind.endswith("zst"):
        import zstandard

        return zstandard.compress(content)
    return content


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_open_anywhere(tmp_path: Path, suffix: str) -> None:
    content = random.Random(1).randbytes(1000) * 5000 + b"the end\n"
    path = tmp_path / f"x.txt.{suffix}"
    path.write_bytes(_packed(content, suffix))
    assert content_size(path) == len(content)
    with open_bytes(path) as opened:
        for at in (0, 4_999_990, 17, 2_500_000, len(content) - 8, len(content)):
            opened.seek(at)
            assert opened.read(100) == content[at : at + 100]
        opened.seek(0)
        assert b"".join(iter(lambda: opened.read(70_001), b"")) == content
    if suffix == "gz":  # several members, and zeros at the end as tapes have them
        path.write_bytes(_packed(content[:1_000_000], suffix) + _packed(content[1_000_000:], suffix) + bytes(512))
        assert content_size(path) == len(content)
    path.write_bytes(_packed(content, suffix)[:-50])
    with pytest.raises(DataError, match=str(path)):
        content_size(path)


def test_malformed_lines_are_named_with_place_and_limited(tmp_path: Path) -> None:
    lines = json_lines(texts()).splitlines(keepends=True)
    lines[1500] = b'{"text": broken\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    data = stream(tmp_path / "a.jsonl")
    numbers = one_epoch(data)
    assert sorted(numbers) == [n for n in range(DOCUMENTS) if n != 1500]
    (said,) = [line for line in data.news({}, BatchPlan()) if "left out" in line]
    offset = sum(len(line) for line in lines[:1500])
    assert "a.jsonl" in said and "broken JSON" in said and str(offset)[:4] in said
    with pytest.raises(DataError, match="on_bad skip"):
        one_epoch(stream(tmp_path / "a.jsonl", on_bad="error"))
    (tmp_path / "b.jsonl").write_bytes(b"".join(b"nothing\n" if n % 3 else line for n, line in enumerate(lines)))
    with pytest.raises(DataError, match=r"malformed; mend the data, or allow more: --data\.bad_limit 1"):
        one_epoch(stream(tmp_path / "b.jsonl"))


def test_a_source_that_changes_is_noticed_and_named(tmp_path: Path, file: Path) -> None:
    before = stream(file)
    made = before.batches(before.start, BatchPlan(3, 16))
    next(made)
    file.write_bytes(json_lines(texts(DOCUMENTS + 1)))
    with pytest.raises(DataError, match=r"a\.jsonl was changed while"):
        for _ in range(300):
            next(made)
    after = stream(file)
    assert after.fingerprint() != before.fingerprint()
    assert "a.jsonl has other content" in after.difference(before.fingerprint())
    moved = tmp_path / "elsewhere" / "a.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    assert stream(moved).fingerprint() == after.fingerprint()


def test_shares_of_a_mixture_are_exact(tmp_path: Path) -> None:
    for name, mark in (("a", "A"), ("b", "B"), ("c", "C")):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([mark * 63 for _ in range(2000 if name == "a" else 700)]))
    paths = [tmp_path / f"{name}.jsonl" for name in "abc"]
    data = stream(paths, weights=[0.7, 0.2, 0.1], packing="none", seq_len=64)
    steps, positions = take(data, 128)  # 2048 rows
    marks = Counter(chr(row[0]) for step in ids(steps) for row in step)
    assert marks == {"A": 2 * 717, "B": 2 * 205, "C": 2 * 102}
    assert ids(take(data, 4, positions[100])[0]) == ids(steps[101:105])
    halves = [take(data, 20, rank=rank, world_size=2)[0] for rank in (0, 1)]
    assert [a + b for a, b in zip(ids(halves[0]), ids(halves[1]))] == ids(steps[:20])


def test_bad_input_says_what_to_type(tmp_path: Path, file: Path) -> None:
    (tmp_path / "small.txt").write_text("hello\n" * 100)
    small = stream(tmp_path / "small.txt")
    with pytest.raises(ConfigError, match=r"leave --data\.streaming away"):
        take(small, 1)
    (tmp_path / "array.json").write_text('[{"text": "a"}]')
    with pytest.raises(InputError, match="jq"):
        stream(tmp_path / "array.json")
    with pytest.raises(InputError, match="text_column"):
        (tmp_path / "x.csv").write_text("a,b\n1,2\n")
        stream(tmp_path / "x.csv")
    data = stream(file)
    with pytest.raises(CheckpointError, match=r"without --data\.streaming"):
        take(data, 1, 17)
    _, positions = take(data, 1)
    with pytest.raises(CheckpointError, match="global batch"):
        take(data, 1, positions[0], global_batch_size=8)


def test_held_out_blocks_are_not_trained_on(file: Path) -> None:
    from treadle.data.dataset import splits_of
    from treadle.data.settings import DataSettings
    from treadle.text.settings import TokenizerSettings

    keys = {"path": str(file), "streaming": True, "seq_len": 256, "packing": "best_fit", "validation_fraction": 0.1, "test_fraction": 0.05}
    splits: Any = splits_of(DataSettings(**keys), TokenizerSettings(name="byte"))
    trained = one_epoch(splits["train"])
    held = [documents_in(splits[name], [list(splits[name].in_sequence(8))]) for name in ("validation", "test")]
    assert sorted(trained + held[0] + held[1]) == list(range(DOCUMENTS))
    assert 0.05 < len(held[0]) / DOCUMENTS < 0.15 and len(held[1]) > 30


def test_a_hugging_face_data_set_streams(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra hf (datasets) is not installed")
    datasets.Dataset.from_dict({"text": texts()}).save_to_disk(str(tmp_path / "saved"))
    from treadle.data.dataset import splits_of
    from treadle.data.settings import DataSettings
    from treadle.text.settings import TokenizerSettings

    keys = {"dataset_name": str(tmp_path / "saved"), "streaming": True, "seq_len": 256, "packing": "best_fit", "validation_fraction": 0.0}
    data: Any = splits_of(DataSettings(**keys), TokenizerSettings(name="byte"))["train"]
    assert sorted(one_epoch(data)) == list(range(DOCUMENTS))
    whole, positions = take(data, 20)
    assert ids(take(data, 2, positions[10])[0]) == ids(whole[11:13])


@pytest.mark.parametrize("separator", ["<|end|>", "", "x"])
def test_separated_text_is_the_same_however_it_is_cut(tmp_path: Path, separator: str) -> None:
    """Every document once, wherever a range ends: inside a separator, inside a long line, at a line end."""
    dice = random.Random(7)
    lines = [separator, separator, "a", "xy", "x", "<|end|", "z" * 30, ""]
    for trial in range(150):
        text = "".join(dice.choice(lines) + dice.choice(["\n", "\n", "\r\n"]) for _ in range(dice.randint(1, 40))) + dice.choice(["", "tail"])
        (tmp_path / "a.txt").write_bytes(text.encode())
        whole = open_source(tmp_path / "a.txt", separator=separator)
        expected = [d for p in whole.pieces() for d in whole.read(p)]
        for step in (1, 2, 3, 7, 16, 33):
            cut = open_source(tmp_path / "a.txt", separator=separator)
            cut.piece_bytes = step
            found = [d for p in cut.pieces() for d in cut.read(p)]
            assert [d for d in found if d] == [d for d in expected if d], (trial, step, text)
