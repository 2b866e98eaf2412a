"""The model card of an export: what the run's files say and nothing else, and somebody's own README stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from treadle.checkpoint import writer
from treadle.models.base import build, describe
from treadle.models.export import export
from treadle.models.model_card import _short, is_ours, stated_licence
from treadle.monitor.records import write_json
from treadle.text.base import Tokenizer

SHAPE = {"style": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 256}
COMMAND = ["treadle", "train", "/home/somebody/texts/data.jsonl", "--from", "owner/base@main", "--cache_dir=/home/somebody/cache", "--max_steps", "3"]


def a_run(folder: Path, data: str = "austen", **files: Any) -> Path:
    """A run's folder with a checkpoint of a small random model, without training."""
    torch.manual_seed(0)
    model = build("transformer", None, **SHAPE)
    lines = ['[model]\narch = "transformer"', *(f"{key} = {json.dumps(value)}" for key, value in SHAPE.items())]
    config = "\n".join([*lines, '[tokenizer]\nname = "byte"', f"[data]\npath = {json.dumps(data)}"]) + "\n"
    Tokenizer.load("byte").save(folder / "tokenizer")
    members = {"config.toml": config.encode(), "config.json": describe(type(model), model.config).encode()}
    members |= {f"tokenizer/{path.name}": path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    weights = {name: tensor.detach() for name, tensor in model.named_weights().items()}
    writer.save(folder / "checkpoints", 3, {"model": weights}, members, {"weights_only": False})
    (folder / "config.toml").write_text(config)
    for name, table in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, table)
    return folder


def front_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_the_files_of_the_run_say(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not here: pip install 'treadle[hf]'")
    run = a_run(
        tmp_path / "my run", data="/home/somebody/texts/data.jsonl", environment={"command": COMMAND},
        summary={"parameters": 12345, "tokens": 6789},
        results__evaluation_results={"data": "/home/somebody/held.txt", "metrics": {"loss": 1.25, "bpb": 1.5, "labels": 10}},
        results__harness_results={"tasks": {"rhymes": {"acc": 0.5, "acc_stderr": 0.1}}},
    )  # fmt: skip
    for layout, library in (("treadle", "treadle"), ("huggingface", "transformers")):
        card = (export(str(run), layout=layout, license="apache-2.0") / "README.md").read_text()
        assert is_ours(card) and front_of(card)["library_name"] == library
        assert ('tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")' in card) is (layout == "huggingface")
        assert "somebody" not in card  # folders of absolute paths may name people
        for said in ("12,345 parameters", "6,789 tokens", "- data.jsonl", "| held.txt | bpb | 1.5000 |", "| rhymes | acc | 0.5000 |",
                     "treadle train data.jsonl --from owner/base@main --cache_dir=cache --max_steps 3", "apache-2.0, as whoever exported"):
            assert said in card, said
        read = hub.ModelCard(card).data
        assert (read.license, read.base_model, read.datasets) == ("apache-2.0", "owner/base", ["data.jsonl"])
        assert read.pipeline_tag == "text-generation" and read.tags == ["treadle", "transformer"]
        assert read.metrics == ["loss", "bits_per_byte", "acc"]
        assert [(one.dataset_name, one.metric_name, one.metric_value) for one in read.eval_results] == [
            ("held.txt", "loss", 1.25), ("held.txt", "bpb", 1.5), ("rhymes", "acc", 0.5)]  # fmt: skip


def test_nothing_is_claimed_that_no_file_says(tmp_path: Path) -> None:
    card = (export(str(a_run(tmp_path / "bare"))) / "README.md").read_text()
    front = front_of(card)
    assert front["license"] == "unknown" and "metrics" not in front and "model-index" not in front
    assert "Metrics" not in card and "Command" not in card and "public domain" in card and "Nobody stated one" in card


@pytest.mark.parametrize("layout", ["treadle", "huggingface", "gguf"])
def test_a_readme_of_somebody_is_kept(layout: str, tmp_path: Path) -> None:
    if layout == "gguf":
        pytest.importorskip("gguf", reason="the gguf package is not here: pip install 'treadle[hf]'")
    run = a_run(tmp_path / "run")
    written = export(str(run), layout=layout)
    path = (written.parent if layout == "gguf" else written) / "README.md"
    first = path.read_text()
    export(str(run), layout=layout, license="mit")  # a card as it was written is written anew
    assert path.read_text() != first and "license: mit" in path.read_text()
    own = path.read_text().replace("# run", "# Mine")
    path.write_text(own)
    export(str(run), layout=layout, license="apache-2.0")
    assert path.read_text() == own
    if layout == "treadle":
        export(str(written), output=str(tmp_path / "again"))  # an edited card does not make the folder a damaged one
    path.write_text("my own words\n")
    export(str(run), layout=layout)
    assert path.read_text() == "my own words\n"


def test_a_licence_that_the_weights_come_with_goes_on(tmp_path: Path) -> None:
    base = export(str(a_run(tmp_path / "base")), layout="huggingface", license="cc-by-4.0")
    assert stated_licence(base) == "cc-by-4.0"
    tuned = a_run(tmp_path / "tuned", environment={"command": ["treadle", "train", "--from", str(base)]})
    card = (export(str(tuned)) / "README.md").read_text()
    assert front_of(card)["license"] == "cc-by-4.0" and "The weights they come from state cc-by-4.0" in card
    assert "starts from the weights of huggingface" in card and "base_model" not in front_of(card)
    converted = export(str(base), output=str(tmp_path / "converted"))
    assert front_of((converted / "README.md").read_text())["license"] == "cc-by-4.0"
    for broken in ("---\n[\n---\n", "---\nlicense: 3\n---\n", "no front", "---\n"):
        (base / "README.md").write_text(broken)
        assert stated_licence(base) is None


@pytest.mark.parametrize("word, short", [
    ('["/home/me/a.txt","~/b/c.txt"]', '["a.txt","c.txt"]'), ("/a/x.txt,/b/y.txt", "x.txt,y.txt"), ("--data=file:///home/me/t.txt", "--data=t.txt"),
    ("s3://bucket/a/b.txt", "s3://bucket/a/b.txt"), ("https://host/a/b", "https://host/a/b"), ("a/b.txt", "a/b.txt"), ("owner/name", "owner/name"),
])  # fmt: skip
def test_folders_are_left_out_wherever_a_word_has_them(word: str, short: str) -> None:
    assert _short(word) == short
