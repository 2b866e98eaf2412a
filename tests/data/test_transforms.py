"""Transforms: the same as a plain loop, in workers and streams, part of the run's identity, and never a crash."""

from __future__ import annotations

import functools
import itertools
import json
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import treadle
from treadle.data.base import BatchPlan, Dataset
from treadle.data.dataset import splits_of
from treadle.data.deduplication import ExactDeduplication, NearDeduplication
from treadle.data.settings import DataSettings
from treadle.data.sources import Bad, Source, open_source
from treadle.data.transformed import transformed
from treadle.data.transforms import BatchedMap, Filter, Map, MaximumLength, MinimumLength
from treadle.errors import ConfigError, DataError
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings
from treadle.training.resolve import check_data


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))


def texts(count: int = 2000) -> list[str]:
    dice = random.Random(0)
    return [f"{n:05d} " + "".join(dice.choices("abcdefgh ", k=dice.randint(14, 144))) for n in range(count)]


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "a.jsonl", texts())


def louder(text: str) -> str:
    return text.upper()


def is_even(text: str) -> bool:
    return int(text[:5]) % 2 == 0


def doubled(batch: list[str]) -> list[str]:
    return [part for text in batch for part in (text, text[:5] + " again")]


def documents_of(source: Source) -> list[Any]:
    return [document for piece in source.pieces() for document in source.read(piece)]


def through(path: Path, *transforms: Any) -> list[Any]:
    return documents_of(transformed([open_source(path)], transforms)[0])


def test_the_same_as_a_plain_loop(file: Path) -> None:
    found = through(file, Map(louder), Filter(is_even), BatchedMap(doubled, 7), MinimumLength(9), MaximumLength(60))
    wanted = [part for text in map(louder, texts()) if is_even(text) for part in doubled([text]) if 9 <= len(part) <= 60]
    assert found == wanted and wanted
    assert through(file, MaximumLength(10, cut=True)) == [text[:10] for text in texts()]


def splits(path: Any, transforms: list[Any], **keys: Any) -> dict[str, Any]:
    settings = DataSettings(**{"path": str(path), "seq_len": 64, "validation_fraction": 0.0, "packing": "best_fit", **keys})
    sources = transformed([open_source(path)], transforms)
    return splits_of(settings, TokenizerSettings(name="byte"), tokenizer=Tokenizer.load("byte"), sources=sources)


def take(data: Any, count: int, position: Any = None, **plan: Any) -> tuple[list[Any], list[Any]]:
    made = data.batches(data.start if position is None else position, BatchPlan(**{"seed": 3, "global_batch_size": 16, **plan}))
    steps = list(itertools.islice(made, count))
    made.close()
    return [torch.cat([b.input_ids for b in batches]).tolist() for batches, _ in steps], [position for _, position in steps]


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_and_resume_give_the_same_rows(file: Path, streaming: bool) -> None:
    data = splits(file, [Map(louder), Filter(lambda text: is_even(text))], streaming=streaming)["train"]
    rows, positions = take(data, 12)
    assert take(data, 12, workers=2)[0] == rows
    assert take(data, 6, json.loads(json.dumps(positions[5])))[0] == rows[6:]
    plain = write(file.with_name("plain.jsonl"), [louder(text) for text in texts() if is_even(text)])
    if not streaming:  # a stream's blocks are those of the file before its transforms
        assert take(splits(plain, [])["train"], 12)[0] == rows
    letters = {chr(n) for row in rows for ids in row for n in ids if n < 256}
    assert "A" in letters and "a" not in letters


def make(folder: Path, body: str, name: str = "clean.py") -> Callable[..., Any]:
    """A function of a file, as an import would give it."""
    from treadle import trusted_code

    folder.mkdir(exist_ok=True)
    (folder / name).write_text(body)
    trusted_code.allow(folder / name)
    return trusted_code.load(f"{folder / name}:clean", "data.transforms")


def test_a_fingerprint_follows_what_the_function_does(tmp_path: Path) -> None:
    body = "def clean(text):\n    return text.lower()\n"
    here = Map(make(tmp_path / "one", body))
    assert Map(make(tmp_path / "other", body)).fingerprint() == here.fingerprint()  # a moved file
    assert Map(make(tmp_path / "two", body.replace("lower", "upper"))).fingerprint() != here.fingerprint()
    assert Map(make(tmp_path / "three", body + "# not of the function\n")).fingerprint() == here.fingerprint()
    commented = body.replace("return", "# why\n    return")
    assert Map(make(tmp_path / "four", commented)).fingerprint() != here.fingerprint()  # a comment inside is a change
    assert Filter(here.function).fingerprint() != here.fingerprint()
    assert here.label() == "clean.py:clean"


def test_values_of_the_closure_and_defaults_count() -> None:
    def shortened(length: Any) -> Callable[[str], str]:
        return lambda text: text[:length]

    assert Map(shortened(3)).fingerprint() == Map(shortened(3)).fingerprint() != Map(shortened(4)).fingerprint()
    assert Map(shortened(3)).fingerprint() is not None
    assert Map(shortened(object())).fingerprint() is None  # nothing stable stands for it

    def prefixed(text: str, mark: str = "a") -> str:
        return mark + text

    before = Map(prefixed).fingerprint()
    prefixed.__defaults__ = ("b",)
    assert Map(prefixed).fingerprint() != before


def test_what_has_no_source_has_no_fingerprint(file: Path) -> None:
    one, other = (lambda text: text.lower()), (lambda text: text.upper())
    assert Map(one).fingerprint() is None and Map(other).fingerprint() is None  # two on a line
    assert Map(str.lower).fingerprint() is None
    typed = types.FunctionType(louder.__code__.replace(co_filename="<stdin>"), {})  # as if typed into an interpreter
    assert Map(typed).fingerprint() is None
    assert Map(one, version=1).fingerprint() == Map(other, version=1).fingerprint() != Map(one, version=2).fingerprint()
    for streaming in (False, True):
        data = splits(file, [Map(one)], streaming=streaming)["train"]
        with pytest.raises(ConfigError, match=r"<lambda>.*version=.*--allow-change data"):
            check_data(data.fingerprint(), data)
        data = splits(file, [Map(one, version=1)], streaming=streaming)["train"]
        check_data(data.fingerprint(), data)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_function_is_refused_by_name(file: Path, tmp_path: Path, streaming: bool) -> None:
    body = "def clean(text):\n    return text.lower()\n"
    before = splits(file, [Map(make(tmp_path / "one", body))], streaming=streaming)["train"]
    moved = splits(file, [Map(make(tmp_path / "two", body))], streaming=streaming)["train"]
    check_data(before.fingerprint(), moved)
    after = splits(file, [Map(make(tmp_path / "one", body.replace("lower", "upper")))], streaming=streaming)["train"]
    with pytest.raises(ConfigError, match=r"clean\.py:clean \(transform 1\) has changed.*--allow-change data"):
        check_data(before.fingerprint(), after)
    with pytest.raises(ConfigError, match=r"clean\.py:clean \(transform 1\) is gone|is not what this run was started with"):
        check_data(before.fingerprint(), splits(file, [], streaming=streaming)["train"])


def raising(text: str) -> str:
    if text.startswith("00003"):
        raise ValueError("three")
    return text


def test_a_document_that_a_transform_raises_on_is_malformed(file: Path) -> None:
    found = through(file, Map(raising))
    assert [n for n, one in enumerate(found) if isinstance(one, Bad)] == [3]
    assert "document 4" in str(found[3]) and "raising raised ValueError: three" in str(found[3]) and "a.jsonl" in str(found[3])
    assert splits(file, [Map(raising)])["train"].stats()["malformed"] == 1
    with pytest.raises(DataError, match="raising raised ValueError: three"):
        splits(file, [Map(raising)], on_bad="error")
    with pytest.raises(DataError, match="returned int"):
        splits(file, [Map(len)])  # type: ignore[arg-type]
    bad = [one for one in through(file, BatchedMap(lambda batch: "no list", 50)) if isinstance(one, Bad)]  # type: ignore[arg-type, return-value]
    assert len(bad) == 2000
    stream = splits(file, [Map(raising)], streaming=True, on_bad="error")["train"]
    with pytest.raises(DataError, match="three"):
        take(stream, 300)


def test_exact_duplicates_are_left_out_wherever_they_are(tmp_path: Path) -> None:
    documents = [text for text in texts(300) for _ in range(2)] + ["  " + texts(3)[2].replace(" ", "  ")]
    random.Random(1).shuffle(documents)
    a, b = write(tmp_path / "a.jsonl", documents[:350]), write(tmp_path / "b.jsonl", documents[350:])
    for piece_bytes in (1 << 24, 4000):  # whatever the pieces
        sources = transformed([open_source(a), open_source(b)], [ExactDeduplication()])
        for source in sources:
            source.piece_bytes = piece_bytes
        seen: set[str] = set()
        wanted = [d for d in documents if not ((k := " ".join(d.split())) in seen or seen.add(k))]
        assert [d for source in sources for d in documents_of(source)] == wanted
    assert len(wanted) == 300
    data = Dataset.load([str(a), str(b)], "byte", 64, deduplicate="exact", validation_fraction=0.0)
    assert "ExactDeduplication left out 301 of 601 documents" in data.describe()
    again = documents_of(transformed([open_source(a)], [Map(louder), Filter(is_even), ExactDeduplication()])[0])
    assert len(again) == len({" ".join(t.split()) for t in again})


def jaccard(a: str, b: str, n: int) -> float:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.lower().split()
        return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}

    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def test_near_duplicates_against_brute_force(tmp_path: Path) -> None:
    dice, documents = random.Random(0), []
    for _ in range(30):
        words = [f"w{dice.randint(0, 500)}" for _ in range(120)]
        documents.append(" ".join(words))
        words[60] = "changed"  # 5 of 116 five-grams: about .92
        documents.append(" ".join(words))
        documents.append(" ".join(dice.sample(words, len(words))))  # the same words, no gram
        documents.append(" ".join(words[:60] + [f"x{n}" for n in range(60)]))  # about a third
    dice.shuffle(documents)
    kept: list[str] = []
    for text in documents:
        if all(jaccard(text, other, 5) < 0.8 for other in kept):
            kept.append(text)
    found = through(write(tmp_path / "a.jsonl", documents), NearDeduplication())
    assert found == kept and len(kept) == 90
    rule = NearDeduplication(permutations=256)
    for a, b in itertools.combinations(documents[:30], 2):
        assert abs(np.mean(rule.signature(a) == rule.signature(b)) - jaccard(a, b, 5)) < 0.12


CLEAN = '''def clean(text):
    return text.replace("a", "")


def long_enough(text):
    return len(text) > 40
'''
SHORT = ["--num_layers", "1", "--hidden_size", "32", "--num_heads", "2", "--batch_size", "4", "--seq_len", "32", "--tokenizer.name", "byte",
         "--model.head_dim", "16", "--sample_tokens", "0", "--eval_rows", "2", "--run.device", "cpu"]  # fmt: skip


@pytest.mark.parametrize("streaming", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_from_the_command_line(file: Path, tmp_path: Path, streaming: str) -> None:
    (tmp_path / "clean.py").write_text(CLEAN)
    words = ["train", "--data.path", str(file), "--data.transforms", "clean.py:clean", "--data.filters", "clean.py:long_enough", *SHORT,
             "--data.streaming", streaming, "--data.deduplicate", "exact", "--run.output_dir", "out"]  # fmt: skip
    out = treadle(*words, "--max_steps", "2", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "left out 0 of" in out.stdout + out.stderr
    (tmp_path / "clean.py").write_text(CLEAN.replace('"a"', '"b"'))
    out = treadle(*words, "--max_steps", "4", cwd=tmp_path)
    assert out.returncode == 2 and "clean.py:clean (transform 1) has changed" in out.stderr, out.stderr
    assert treadle(*words, "--max_steps", "4", "--allow-change", "data", cwd=tmp_path).returncode == 0


def sayings(start: int = 0) -> Any:
    yield from texts()[start:]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pipeline_of_anything_gives_the_rows_of_its_text(file: Path, streaming: bool) -> None:
    import treadle as library

    keys: dict[str, Any] = {"seq_len": 64, "streaming": streaming, "validation_fraction": 0.0}
    data = library.DataPipeline(file, "byte", [louder, is_even_text, library.MinimumLength(20)], **keys)
    plain = splits(file, [Map(louder), Filter(is_even_text), MinimumLength(20)], streaming=streaming, packing="concat")["train"]
    assert take(data, 6)[0] == take(plain, 6)[0] and data.fingerprint() == plain.fingerprint()
    for given in (open_source(file), [str(file)]):
        assert take(library.DataPipeline(given, "byte", [louder, is_even_text, library.MinimumLength(20)], **keys), 6)[0] == take(plain, 6)[0]
    made = library.DataPipeline(sayings, "byte", [louder], **keys)
    rows, positions = take(made, 6)
    assert take(library.DataPipeline(sayings, "byte", [louder], **keys), 3, positions[2])[0] == rows[3:]
    assert take(made, 6, workers=2)[0] == rows
    check_data(made.fingerprint(), library.DataPipeline(sayings, "byte", [louder], **keys))
    if not streaming:
        assert rows == take(library.DataPipeline(file, "byte", [louder], **keys), 6)[0]


def is_even_text(text: str) -> bool:
    return int(text[:5]) % 2 == 0


def test_functions_that_give_texts() -> None:
    import treadle as library

    calls = []

    def without_start() -> Any:
        calls.append(1)
        return iter(texts())

    with pytest.raises(ConfigError, match="take `start: int`"):
        library.DataPipeline(without_start, "byte", streaming=True)
    data = library.DataPipeline(without_start, "byte", version=1, max_samples=120, validation_fraction=0.0)
    assert data.stats()["documents"] == 120 and len(calls) == 2  # once to be counted, once to be read
    library.DataPipeline(without_start, "byte", version=1, max_samples=120, validation_fraction=0.0)
    assert len(calls) == 2  # what was prepared is found again
    unknown = library.DataPipeline(functools.partial(texts, 120), "byte")
    with pytest.raises(ConfigError, match=r"partial.*version="):
        check_data(unknown.fingerprint(), unknown)
    with pytest.raises(DataError, match="broken raised ValueError"):
        library.DataPipeline(broken, "byte")
    with pytest.raises(ConfigError, match="a source is a path"):
        library.DataPipeline(3, "byte")


def broken() -> Any:
    yield "one"
    raise ValueError("two")


def test_a_trainer_takes_a_pipeline_and_goes_on(file: Path, tmp_path: Path) -> None:
    import treadle as library

    def trainer(change: str, steps: int) -> Any:
        data = library.DataPipeline(file, "byte", [Map(lambda text: text + change)], seq_len=32, streaming=True)
        model = library.build("transformer", hidden_size=32, num_layers=1, num_heads=2, head_dim=16, vocab_size=data.tokenizer.vocab_size)
        config = library.TrainConfig(output_dir=str(tmp_path / "out"), max_steps=steps, batch_size=4, device="cpu", save_steps=2)
        return library.Trainer(model, data, config=config, resume=True)

    trainer("a", 2).train()
    further = trainer("a", 4)
    further.train()
    assert further.state.step == 4
    with pytest.raises(ConfigError, match="has changed"):
        trainer("b", 6).train()


def test_preparing_in_processes_sends_functions_by_name(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from treadle.data import prepare

    monkeypatch.setattr(prepare, "PARALLEL_FROM", 0)
    by_name = Map(make(tmp_path / "own", "def clean(text):\n    return text.upper()\n"))
    found = []
    for number, transforms in enumerate(([by_name], [Map(lambda text: text.upper())])):
        (source,) = transformed([open_source(file)], [*transforms, ExactDeduplication()])
        source.piece_bytes = 50_000
        assert len(source.pieces()) > 2
        job = prepare.PieceJob(0, source.pieces()[0], source, "", "", prepare.Split((0.0, 0.0), False), 0, "skip")
        assert prepare._travels(job) == (number == 0)  # a lambda is called in this process
        sets = prepare.prepare(source, Tokenizer.load("byte"), root=tmp_path / f"cache{number}", held=(0.0, 0.0), workers=2)
        found.append([shard.ids.tolist() for shard in sets["train"].shards])
    assert found[0] == found[1]
