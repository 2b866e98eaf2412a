"""Packed exports: small, and the same answers bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import treadle
from tests.conftest import treadle as command
from treadle.checkpoint.reader import Checkpoint
from treadle.data.batch import Batch
from treadle.errors import CheckpointError
from treadle.layers import packed_weights
from treadle.models.base import build_from
from treadle.models.hgrn_bit import HGRNBit, HGRNBitConfig
from treadle.models.pretrained import load_run


@pytest.mark.parametrize("shape", [(7, 5), (3, 11), (1, 1), (64, 96)])
def test_five_values_to_a_byte_and_back(shape: tuple[int, int]) -> None:
    ternary = torch.randint(-1, 2, shape, dtype=torch.int8)
    codes = packed_weights.to_trits(ternary)
    assert codes.nbytes == -(-ternary.numel() // 5) and torch.equal(packed_weights.from_trits(codes, ternary.shape), ternary)
    with pytest.raises(CheckpointError, match="not those of a matrix"):
        packed_weights.from_trits(codes, torch.Size((shape[0] + 5, shape[1])))
    with pytest.raises(CheckpointError, match="not those of a matrix"):
        packed_weights.from_trits(torch.full_like(codes, 243), ternary.shape)


def test_the_preset_of_25_million_takes_5_megabytes() -> None:
    model = build_from(HGRNBit, HGRNBitConfig.with_preset("slm_base"))
    small = packed_weights.pack(model, model.named_weights())
    assert sum(t.nbytes for n, t in small.items() if n.endswith((packed_weights.TRITS, packed_weights.SCALE))) <= 6.2e6
    other = build_from(HGRNBit, HGRNBitConfig.with_preset("slm_base"), seed=1)
    other.load_weights(small)
    batch = Batch.from_ids(torch.randint(0, 256, (1, 20)))
    with torch.no_grad():
        assert torch.equal(model.eval()(batch).logits, other.eval()(batch).logits)


@pytest.mark.slow  # five commands, 20 s; that packed weights are written and read again is tested above
def test_an_export_answers_like_its_run_and_can_be_exported_and_trained_again(text_file: Path, tmp_path: Path) -> None:
    flags = ["--tokenizer", "byte", "--hidden_sizes", "32,48", "--num_blocks", "[[1,0,1],[1]]", "--seq_len", 32, "--batch_size", 2]
    made = command("train", text_file, "--model.arch", "hnet", *flags, "--max_steps", 4, "--output_dir", tmp_path / "run")
    assert made.returncode == 0, made.stderr
    for source, target in (("run", "small"), ("small", "again")):
        out = command("export", tmp_path / source, "--packed", "--output", tmp_path / target)
        assert out.returncode == 0 and "packed" in out.stdout, out.stderr
    stored = Checkpoint(tmp_path / "small").tensors("model")
    again = Checkpoint(tmp_path / "again").tensors("model")
    assert all(torch.equal(stored[name], again[name]) for name in stored) and stored.keys() == again.keys()
    batch = Batch.from_ids(torch.randint(0, 256, (2, 40)))
    with torch.no_grad():
        whole, small = (load_run(str(tmp_path / n), "cpu").model(batch).logits for n in ("run", "small"))
    assert torch.equal(whole, small)
    said = [command("generate", tmp_path / n, "--prompt", "one two", "--max-new-tokens", 30).stdout for n in ("run", "small")]
    assert said[0] == said[1] != ""
    on = command("train", text_file, "--from", tmp_path / "small", *flags[:2], *flags[-4:], "--max_steps", 2,
                 "--output_dir", tmp_path / "on")  # fmt: skip
    assert on.returncode == 0, on.stderr


def test_what_is_not_ternary_cannot_be_packed(text_file: Path, tmp_path: Path) -> None:
    model = treadle.build("hgrn_bit", vocab_size=256, hidden_size=16, num_layers=1, ternary=False)
    assert packed_weights.ternary_layers(model) == {}
    command("train", text_file, "--tokenizer", "byte", "--hidden_size", 16, "--num_layers", 1, "--num_heads", 2, "--seq_len", 32,
            "--batch_size", 2, "--max_steps", 1, "--output_dir", tmp_path / "run")  # fmt: skip
    out = command("export", tmp_path / "run", "--packed")
    assert out.returncode == 2 and "no ternary layers" in out.stderr
