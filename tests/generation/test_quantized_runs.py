"""Runs read in fewer bits: what is kept beside them, exports, and what `eval` says it costs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import flags
from tests.conftest import treadle as command
from treadle.errors import CheckpointError, ConfigError, InputError
from treadle.evaluation.report import evaluate_run, table_of
from treadle.generation.reading import layers_of, quantized, remembered
from treadle.layers.quantized_files import from_tensors, to_tensors
from treadle.models.base import from_pretrained
from treadle.models.export import export
from treadle.models.pretrained import load_run
from treadle.models.quantized import quantize_once


@pytest.fixture(scope="module")
def run(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "run"
    command("train", text_file, *flags(hidden_size=64, max_steps=8, output_dir=folder))
    assert (folder / "config.toml").is_file()
    return folder


def kept(run: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in (run / "quantized").glob("*.safetensors"))


def test_it_is_quantised_once_and_kept_beside_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(str(run))
    assert quantize_once(loaded, None) == "fp32" and quantize_once(loaded, "bf16") == "bf16"
    assert quantize_once(loaded, "int4") == "int4" and kept(run) == ["int4"]
    first = loaded.model.generate([5, 6, 7], 10, temperature=0, weights="int4")
    monkeypatch.setattr("treadle.models.quantized.quantized", lambda *_: pytest.fail("quantised again"))
    again = load_run(str(run))
    quantize_once(again, "int4")
    assert torch.equal(again.model.generate([5, 6, 7], 10, temperature=0, weights="int4"), first)
    path = next((run / "quantized").iterdir())
    whole = path.read_bytes()
    monkeypatch.setattr("treadle.models.quantized.quantized", quantized)
    for damaged in (whole[:-10], whole[:-1000] + bytes(byte ^ 1 for byte in whole[-1000:])):  # is made again
        path.write_bytes(damaged)
        assert quantize_once(load_run(str(run)), "int4") == "int4"
        assert path.read_bytes() == whole


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_an_export_is_read_as_it_was_written(run: Path, tmp_path: Path, weights: str) -> None:
    folder = export(str(run), str(tmp_path / "out"), quantize=weights)
    here, there = load_run(str(run)), load_run(str(folder))
    assert remembered(there.model) == weights and quantize_once(there, None) == weights
    want, found = to_tensors(layers_of(here.model, weights)), to_tensors(layers_of(there.model, weights))
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)
    embedding = here.model.embedding.weight
    assert torch.equal(there.model.embedding.weight, embedding.bfloat16().float())  # tied: what the head does not hold
    assert remembered(from_pretrained(folder)) == weights
    again = export(str(folder), str(tmp_path / "again"), quantize=weights)
    assert layers_of(load_run(str(again)).model, weights)["head"].shape == tuple(embedding.shape)
    there.model.embedding.weight.data.add_(1)
    assert remembered(there.model) is None


def test_what_does_not_belong_together_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="int8 or int4"):
        export(str(run), str(tmp_path / "no"), quantize="int3")
    with pytest.raises(InputError, match="huggingface"):
        export(str(run), str(tmp_path / "no"), quantize="int8", layout="huggingface")
    with pytest.raises(ConfigError, match="int3"):
        quantize_once(load_run(str(run)), "int3")
    tensors = to_tensors(quantized(load_run(str(run)).model, "int8"))
    with pytest.raises(CheckpointError, match="no linear layer"):
        from_tensors(tensors, {})
    name = next(iter(tensors)).removesuffix(".weight.codes")
    with pytest.raises(CheckpointError, match="not those"):
        from_tensors({f"{name}.weight.codes": torch.zeros(2, 2), f"{name}.weight.scales": torch.zeros(2)}, {name: (64, 64)})


def test_eval_says_what_they_cost(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    changes = {}
    for weights in ("fp32", "bf16", "int8", "int4"):
        report = evaluate_run(str(copy), rows=8, weights=weights)
        changes[weights] = report["weights"]["loss_change"]
        assert any(f"{weights} weights change the loss by" in line for line in table_of([report]))
    assert changes["fp32"] == 0 and 0 < abs(changes["int4"]) < 0.02 and abs(changes["int8"]) < 0.005 and abs(changes["bf16"]) < 0.001
    assert "weights" not in evaluate_run(str(copy), rows=8)
