"""Export: one folder of whole weights from any run, also one that was saved in shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import treadle
from tests.conftest import treadle as command
from tests.several import run_in
from treadle.errors import CheckpointError, InputError
from treadle.models.export import export

from .test_trainer import checkpoint, text, train  # noqa: F401  (text is a fixture)


@pytest.fixture(scope="module")
def run(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("sharded") / "run"
    run_in(2, train, text, folder, {"parallel.mode": "fsdp"})
    assert checkpoint(folder).sharded
    return folder


def test_shards_become_one_file_of_the_same_bits(run: Path, tmp_path: Path) -> None:
    folder = export(str(run), str(tmp_path / "out"))
    want = checkpoint(run).tensors("model")
    found = treadle.from_pretrained(folder).named_weights()
    assert found.keys() == want.keys() and len(want) > 0
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "transformer"
    model, tokenizer = treadle.load(folder)
    assert tokenizer.vocab_size == 256 and all(torch.equal(t, want[n]) for n, t in model.named_weights().items())


def test_half_the_bytes_in_bf16(run: Path, tmp_path: Path) -> None:
    whole, half = export(str(run), str(tmp_path / "whole")), export(str(run), str(tmp_path / "half"), "bf16")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, half)]
    assert 0.5 <= sizes[1] / sizes[0] < 0.55
    want = {name: t.bfloat16().float() for name, t in checkpoint(run).tensors("model").items()}
    found = treadle.from_pretrained(half).named_weights()
    assert all(torch.equal(found[name], want[name]) for name in want)
    with pytest.raises(InputError, match="fp32, bf16, fp16"):
        export(str(run), str(tmp_path / "no"), "int3")


def test_only_an_export_is_replaced(run: Path, tmp_path: Path) -> None:
    assert export(str(run)) == run / "export" == export(str(run))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    for taken in (tmp_path / "mine", run, run / "checkpoints" / "step-00000012"):
        with pytest.raises(InputError, match="--output"):
            export(str(run), str(taken))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me" and (run / "config.toml").is_file()


def test_the_command_and_what_may_be_done_with_its_folder(run: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    made = command("export", run, "--output", out)
    assert made.returncode == 0 and "in fp32" in made.stdout, made.stderr
    assert command("generate", out, "--prompt", "the", "--max-new-tokens", "3").stdout.startswith("the")
    begun = command("train", text, "--from", out, "--max_steps", 1, "--seq_len", 32, "--output_dir", tmp_path / "next")
    assert begun.returncode == 0 and f"Weights from {out}" in begun.stdout, begun.stderr
    refused = command("train", text, "--resume_from_checkpoint", out, "--seq_len", 32, "--output_dir", tmp_path / "third")
    assert refused.returncode == 2 and f"--from {out}" in refused.stderr, refused.stderr


def test_damage_is_found(run: Path, tmp_path: Path) -> None:
    folder = export(str(run), str(tmp_path / "out"))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        treadle.load(folder)
