"""Plans of runs that train adapters, against what such runs take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import treadle
from tests.conftest import treadle as command
from treadle.models.export import save_for_transformers
from treadle.planning.memory import FP32

SHAPE: dict[str, Any] = {"hidden_size": 512, "num_layers": 6, "num_heads": 8, "vocab_size": 512, "seq_len": 128, "precision": "fp32", "batch_size": 8}
ADAMW: dict[str, Any] = {"optim.name": "adamw", "flops": 1e11}  # a speed that is given is not measured


def test_what_is_trained_and_what_is_held() -> None:
    whole = treadle.plan("austen", **SHAPE, **ADAMW)
    found = {kind: treadle.plan("austen", **SHAPE, **ADAMW, lora_rank=4, base_precision=kind) for kind in ("fp32", "bf16", "int8")}
    for plan in found.values():
        memory, trained = plan["memory"], plan["trained_parameters"]
        assert trained < 0.05 * whole["parameters"] and plan["parameters"] == whole["parameters"] + trained
        assert memory["grads_gb"] == pytest.approx(FP32 * trained / 1e9, rel=1e-6)
        assert memory["optimizer_gb"] == pytest.approx(2 * FP32 * trained / 1e9, rel=0.01)
    held = [found[kind]["memory"]["params_gb"] for kind in ("fp32", "bf16", "int8")]
    assert held[0] == pytest.approx(whole["memory"]["params_gb"], rel=0.05) and held[0] > 1.8 * held[1] > 2 * held[2]
    # Two of three products remain: the third is a frozen weight's gradient.
    assert found["fp32"]["flops_per_token"] == pytest.approx(2 / 3 * whole["flops_per_token"], rel=0.1)
    sent = treadle.plan("austen", **SHAPE, **ADAMW, lora_rank=4, world=4)["traffic_gb"]["total"]
    assert sent < 0.05 * treadle.plan("austen", **SHAPE, **ADAMW, world=4)["traffic_gb"]["total"]


def test_patterns_of_some_layers_are_traced_whole() -> None:
    deep = {**SHAPE, "num_layers": 8}  # four periods of two: value_embeddings are in every second block
    one = treadle.plan("austen", **deep, **ADAMW, lora_rank=4, lora_targets=["layers.5.*"])
    every = treadle.plan("austen", **deep, **ADAMW, lora_rank=4)
    assert one["exact"] and not every["exact"] and 8 * one["trained_parameters"] == pytest.approx(every["trained_parameters"], rel=0.01)
    # Blocks before the first adapter keep nothing for a backward pass.
    assert one["memory"]["activations_gb"] < 0.5 * every["memory"]["activations_gb"]


@pytest.mark.slow  # a run of each
@pytest.mark.parametrize("flags", [{"batch_size": 2}, {"batch_size": 8, "base_precision": "int8"}], ids=str)
def test_memory_of_a_run_is_within_a_tenth(tmp_path: Path, flags: dict[str, object]) -> None:
    model = treadle.build("transformer", **{k: SHAPE[k] for k in ("hidden_size", "num_layers", "num_heads", "vocab_size")}, tie_embeddings=True)
    save_for_transformers(model, tmp_path / "base")
    (tmp_path / "text.txt").write_text("A line of text that is repeated.\n" * 2000)
    keys = {"from": tmp_path / "base", "lora_rank": 8, "tokenizer.name": "byte", "seq_len": 256, "precision": "fp32", **flags}
    given = [part for key, value in keys.items() for part in (f"--{key}", value)]
    done = command("plan", tmp_path / "text.txt", *given, "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)["memory"]["total_gb"]
    done = command("train", tmp_path / "text.txt", *given, "--output_dir", tmp_path / "run", "--max_steps", 2, "--sample_tokens", 0,
                   "--validation_fraction", 0, timeout=250)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert planned == pytest.approx(json.loads((tmp_path / "run" / "summary.json").read_text())["peak_memory_gb"], rel=0.1)
