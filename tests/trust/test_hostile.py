"""Folders, runs, recipes, checkpoints, tokenizers and data that somebody else made: nothing of theirs runs, nothing points out
of its folder, and no size they claim is believed."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import treadle
from tests.trust.conftest import Code
from treadle import trusted_code
from treadle.checkpoint import writer
from treadle.checkpoint.lock import RunLock
from treadle.data.shards import TokenSet, _stored_plan
from treadle.errors import CheckpointError, ConfigError, DataError, InputError, ShapeError, TreadleError
from treadle.evaluation.report import evaluate_run, write_results
from treadle.models.base import build
from treadle.models.pretrained import load_run
from treadle.recipe import compose, settled_folder, target_layer
from treadle.settings import dump_toml
from treadle.start import Request
from treadle.text.base import Tokenizer

SHAPE = {"vocab_size": 257, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
META = '{"kind": "byte"}'


def checkpoint(root: Path, arch: str = "transformer", meta: str = META, record: dict[str, str] | None = None,
               train: dict[str, str] | None = None, **shape: int) -> Path:  # fmt: skip
    """A run whose checkpoint verifies: whoever made it can compute checksums too."""
    tables = {"run": {"run_name": "sent", "trusted_code": record}, "model": {"arch": arch, **SHAPE, **shape},
              "data": {"path": "austen", "seq_len": 16}, "train": train or {}}  # fmt: skip
    config = dump_toml(tables).encode()
    weights = build("transformer", **SHAPE).named_weights()
    files = {"config.toml": config, "run_state.json": b"{}", "tokenizer/treadle_tokenizer.json": meta.encode()}
    (root / "checkpoints").mkdir(parents=True)
    writer.save(root / "checkpoints", 1, {"model": weights}, files, {})
    (root / "config.toml").write_bytes(config)
    return root


@contextmanager
def little_memory(extra: int = 2 << 30) -> Iterator[None]:
    """Whoever believes a size of terabytes gets a MemoryError, which none of the expected errors is."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# ---- code ----


def test_a_folder_of_a_model(code: Code, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("transformer", **SHAPE).save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "model_type": f"{code.path}:Mine"}))
    for load in (treadle.from_pretrained, treadle.Model.load):
        with pytest.raises(ConfigError, match=rf"--trust-code {code.path} .*trust_code="):
            load(folder)
    assert not code.ran
    assert treadle.from_pretrained(folder, trust_code=[code.path]).arch == "mine"


def test_ones_own_class_in_a_folder_of_a_model(code: Code, tmp_path: Path, new_process: Callable[[], None]) -> None:
    build(f"{code.path}:Mine", **SHAPE).save_pretrained(tmp_path / "model")
    assert treadle.from_pretrained(tmp_path / "model").arch == "mine"
    new_process()
    with pytest.raises(ConfigError, match="--trust-code"):
        treadle.from_pretrained(tmp_path / "model")
    assert treadle.from_pretrained(tmp_path / "model", trust_code=str(code.path)).arch == "mine"


def test_modules_of_the_folder_are_not_those_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`treadle train --devices 2` in a folder that holds a yaml.py imports Python's, as `treadle` itself does."""
    from treadle.distributed.launch import _safe_path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", str(tmp_path))])
    evil = Code(tmp_path / "yaml.py", "")
    line = [sys.executable, *_safe_path(), "-c" if _safe_path() else "-m", "import yaml; yaml.safe_load"]
    assert subprocess.run(line).returncode == 0 and not evil.ran
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    assert _safe_path() == []


def test_a_run(code: Code, tmp_path: Path) -> None:
    (source,) = trusted_code._sources(str(code.path))
    folder = checkpoint(tmp_path / "run", arch=f"{code.path}:Mine", record={source.path: source.sha256})
    tries: list[Callable[[], object]] = [
        lambda: treadle.load(folder), lambda: treadle.Model.load(folder), lambda: treadle.plan(folder),
        lambda: treadle.train(folder, quiet=True), lambda: treadle.train("austen", quiet=True, output_dir=str(folder)),
        lambda: compose(Request(None, weights_from=str(folder)).layers()),
    ]  # fmt: skip
    for attempt in tries:
        with pytest.raises(ConfigError, match="--trust-code"):
            attempt()
    assert not code.ran
    assert treadle.load(folder, trust_code=str(code.path))[0].arch == "mine"


@pytest.mark.parametrize("key", ["model.arch", "data.dataset_class", "train.objective", "train.callbacks"])
def test_every_key_that_names_code(key: str, code: Code, tmp_path: Path) -> None:
    name: object = f"{code.path}:Mine"
    section, _, leaf = key.partition(".")
    text = dump_toml({section: {leaf: [name] if leaf == "callbacks" else name}})
    (tmp_path / "recipe.toml").write_text(text)
    small = {"max_steps": 1, "seq_len": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "tokenizer.name": "byte"}
    small = {} if key == "model.arch" else small
    with pytest.raises(ConfigError, match="--trust-code"):
        treadle.train(tmp_path / "recipe.toml", quiet=True, output_dir=str(tmp_path / "run"), **{"data.path": "austen"}, **small)
    assert not code.ran


def test_an_objective_of_a_run_that_is_evaluated(code: Code, tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run", train={"objective": f"{code.path}:Mine"})
    with pytest.raises(ConfigError, match="--trust-code"):
        evaluate_run(str(run), rows=1)
    assert not code.ran


def test_a_tokenizer(code: Code, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "treadle_tokenizer.json").write_text(json.dumps({"kind": f"{code.path}:Mine"}))
    with pytest.raises(ConfigError, match="--trust-code"):
        Tokenizer.load(folder)
    run = checkpoint(tmp_path / "run", meta=json.dumps({"kind": f"{code.path}:Mine"}))
    with pytest.raises(ConfigError, match="--trust-code"):
        treadle.load(run)
    assert not code.ran
    with pytest.raises(ConfigError, match=r"wanted is a class derived from treadle\.text\.base\.Tokenizer"):
        treadle.load(run, trust_code=[str(code.path)])


@pytest.mark.parametrize("kind", ["[]", "5", '"../x"', '"os:system"', '"byte:x"', '"a.py:B:C"'])
def test_tokenizer_kinds_that_are_none(kind: str, tmp_path: Path, new_process: Callable[[], None]) -> None:
    (tmp_path / "treadle_tokenizer.json").write_text(f'{{"kind": {kind}}}')
    with pytest.raises(TreadleError):
        Tokenizer.load(tmp_path)


# ---- names ----


@pytest.mark.parametrize("name", ["../../out", "/tmp/out", "a/b", "..", "x\x1b[2J", "a\nb", ""])
def test_a_recipes_run_name_stays_in_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(dump_toml({"run": {"run_name": name}}))
    with pytest.raises(ConfigError, match="run_name"):
        settled_folder([target_layer(str(tmp_path / "r.toml"))])


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/secret.bin", "a/b.bin", "..bin", "secret", "x.bin\0.bin", 5])
def test_prepared_data_cannot_point_outside(name: object, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\0\0")
    (tmp_path / "secret.idx").write_bytes(struct.pack("<q", 1))
    record = {"file": name, "ids": 1, "documents": 1, "sha256": {}}
    (tmp_path / "train" / "dataset.json").write_text(json.dumps({"schema": 2, "vocab_size": 9, "shards": [record]}))
    with pytest.raises(DataError, match="shard that is none"):
        TokenSet.load(tmp_path / "train")


@pytest.mark.parametrize("table", ['{"schema": 2, "shards": []}', '{"schema": 2, "vocab_size": 9, "shards": [5]}',
                                   '{"schema": 2, "vocab_size": 9, "shards": [{"ids": 1}]}', "[]"])  # fmt: skip
def test_prepared_data_of_another_structure(table: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(table)
    with pytest.raises(DataError, match="damaged"):
        TokenSet.load(tmp_path)


def test_a_checkpoints_folder_that_is_a_link(tmp_path: Path) -> None:
    run = checkpoint(tmp_path / "run")
    inside = run / "checkpoints" / "step-00000001" / "tokenizer"
    inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        load_run(str(run))


@pytest.mark.parametrize("name", ["LOCK", "metrics.jsonl", "training_log.csv", "events.jsonl", "samples/step-00000001.txt"])
@pytest.mark.parametrize("there", [True, False])
def test_a_run_whose_files_are_links_is_not_trained(name: str, there: bool, tmp_path: Path) -> None:
    run, victim = checkpoint(tmp_path / "run"), tmp_path / "victim"
    if there:
        victim.write_text("mine")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(victim)
    with pytest.raises(ConfigError, match="is a link to"):
        treadle.train(run, quiet=True)
    assert victim.read_text() == "mine" if there else not victim.exists()


def test_links_within_a_run_are_its_own_business(tmp_path: Path) -> None:
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "a.log").write_text("x")
    (tmp_path / "run" / "wandb" / "debug.log").symlink_to("a.log")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    RunLock(tmp_path / "run").release()


def test_results_do_not_follow_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("evaluation_results.json", "generations.txt"):
        for link in (name, f".{name}.part"):
            (tmp_path / link).symlink_to(victim)
    write_results(tmp_path, {"samples": [{"prompt": "a", "text": "b"}]})
    assert victim.read_text() == "mine" and (tmp_path / "generations.txt").read_text().startswith("===")


@pytest.mark.parametrize("number", range(6))
def test_plans_that_are_none(number: int, tmp_path: Path) -> None:
    """The plan of a packing lies beside a shard; one that does not fit it is made anew."""
    path, good = tmp_path / "plan.npz", (np.array([0, 2]), np.array([0, 3]), np.array([3, 2]))

    def write(rows: np.ndarray, start: np.ndarray, length: np.ndarray, save: Callable[..., None] = np.savez) -> None:
        save(path, row_starts=rows, start=start, length=length)

    write(*good)
    assert _stored_plan(path, 5) is not None and _stored_plan(path, 4) is None
    wrong: list[Callable[[], object]] = [
        lambda: path.write_bytes(b"PK\3\4nonsense"), lambda: path.unlink(),
        lambda: write(good[0], good[1] - 1, good[2]), lambda: write(np.array([0, 9]), *good[1:]),
        lambda: write(np.array([0.0, 2.0]), *good[1:]),
        lambda: write(np.zeros(1 << 27, dtype=np.int8), *good[1:], np.savez_compressed),
    ]  # fmt: skip
    wrong[number]()
    with little_memory(1 << 26):
        assert _stored_plan(path, 5) is None


# ---- sizes ----


@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 1 << 20}, {"hidden_size": 1 << 40}, {"vocab_size": 1 << 40}, {"num_layers": 10**9},
        {"intermediate_size": 1 << 62}, {"num_heads": 10**30}, {"hidden_size": -1},
    ],
    ids=str,
)  # fmt: skip
def test_models_of_absurd_size(shape: dict[str, int], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("transformer", **SHAPE).save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **shape}))
    run = checkpoint(tmp_path / "run", **shape)
    with little_memory():
        with pytest.raises((ConfigError, ShapeError)):
            treadle.from_pretrained(folder)
        with pytest.raises((ConfigError, ShapeError)):
            treadle.load(run)


@pytest.mark.parametrize("header", [
    {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
    {"w": {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [0, 0]}},
    {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
    {"w": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]}},
], ids=range(4))  # fmt: skip
def test_weights_of_absurd_size(header: dict, tmp_path: Path) -> None:
    build("transformer", **SHAPE).save_pretrained(tmp_path)
    text = json.dumps(header).encode()
    for data in (struct.pack("<Q", len(text)) + text, struct.pack("<Q", 2**63) + text, struct.pack("<Q", 1 << 50)):
        (tmp_path / "model.safetensors").write_bytes(data)
        with little_memory(), pytest.raises(CheckpointError):
            treadle.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "\0", '{"model_type": 5}', '{"model_type": ["a"]}', '{"model_type": ""}'])
def test_descriptions_that_are_none(text: str, tmp_path: Path) -> None:
    build("transformer", **SHAPE).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TreadleError):
        treadle.from_pretrained(tmp_path)


def test_a_tokenizer_with_an_id_of_billions(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "</s>": 1, "b": 4294967290}
    table = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with little_memory(), pytest.raises(InputError, match="id 4294967290"):
        _ = Tokenizer.load(tmp_path).byte_lengths


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', "\0", ""])
def test_tokenizer_files_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(TreadleError):
        Tokenizer.load(tmp_path)
