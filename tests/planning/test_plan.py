"""The plan against what really happens: memory, traffic, and recipes far too large for this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import treadle
from tests.conftest import treadle as command
from treadle.distributed.settings import ParallelSettings
from treadle.errors import ConfigError
from treadle.objectives.next_token import NextToken
from treadle.planning.memory import Sizes
from treadle.planning.plan import model_of, parse_bytes
from treadle.planning.rehearsal import rehearse
from treadle.planning.step_trace import Shape
from treadle.planning.traffic import curve, per_step, ring
from treadle.recipe import from_leaf_names
from treadle.training.settings import OptimSettings

LARGE = {"hidden_size": 512, "num_layers": 6, "num_heads": 8, "seq_len": 256, "vocab_size": 2048, "precision": "fp32"}


def measured_gb(folder: Path, mode: str, **keys: object) -> float:
    wanted = {**LARGE, "max_steps": 3, "eval_steps": 100, "save_steps": 100, "sample_tokens": 0,
              "validation_fraction": 0, "output_dir": folder, "run.devices": 2, "parallel.mode": mode, **keys}  # fmt: skip
    flags = [part for key, value in wanted.items() for part in (f"--{key}", value)]
    done = command("train", "austen", *flags, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "summary.json").read_text())["peak_memory_gb"]


def planned(mode: str, **keys: Any) -> dict[str, Any]:
    return treadle.plan("austen", world=2, **{**LARGE, "parallel.mode": mode, **keys})


@pytest.mark.slow  # each of them half a minute
@pytest.mark.parametrize("keys", [{"batch_size": 4}, {"batch_size": 1, "gradient_checkpointing": "true"}], ids=str)
def test_memory_of_one_of_two_processes_is_within_a_tenth(tmp_path: Path, keys: dict[str, Any]) -> None:
    found = planned("fsdp", **keys)["memory"]["total_gb"]
    real = measured_gb(tmp_path / "r", "fsdp", **keys)
    assert found == pytest.approx(real, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
@pytest.mark.parametrize("batch", [1, 8])
def test_memory_in_more_shapes(tmp_path: Path, mode: str, batch: int) -> None:
    found = planned(mode, batch_size=batch)["memory"]["total_gb"]
    assert found == pytest.approx(measured_gb(tmp_path / "r", mode, batch_size=batch), rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}, {"shard_size": 4}], ids=str)
def test_traffic_is_what_the_collectives_handle(options: dict[str, Any], precision: str) -> None:
    """The formula, term by term, against the bytes that a rehearsed step hands to its collectives."""
    cls, config = model_of(from_leaf_names(hidden_size=64, num_layers=3, num_heads=2, **{"model.vocab_size": 96}))
    import torch

    with torch.device("meta"):
        sizes = Sizes.of(cls(config))
    shape, world = Shape(2, 16, 3, precision, False), 8
    settings = ParallelSettings(mode="fsdp", **options)
    batch = cls.example(config, shape.micro_batch, shape.length)
    counted = rehearse(cls, config, NextToken(), OptimSettings(), settings, shape, world, batch)
    formula = per_step(
        sizes, shape, "fsdp", world, settings.shard_size, reshard=settings.reshard_after_forward
    )
    parts = settings.shard_size or world
    # Shards are padded to equal size where a dimension does not divide: up to a few rows.
    assert counted["gather"] == pytest.approx(formula.gather / ring(parts), rel=0.02)
    assert counted["scatter"] == pytest.approx(formula.scatter / ring(parts), rel=0.02)
    if parts < world:
        assert counted["reduce"] == pytest.approx(formula.reduce / (2 * ring(world // parts)), rel=0.02)


@pytest.mark.slow
def test_a_7b_recipe_on_paper_and_rehearsed() -> None:
    """A preset of seven billion parameters on 8 processes: numbers without memory, and one step over fake tensors."""
    found = treadle.plan(
        from_leaf_names(preset="llama_7b", batch_size=1, seq_len=128, precision="bf16", gradient_checkpointing=True,
                        **{"parallel.mode": "fsdp"}),
        world=8, flops=400e12, bandwidth=100e9, device="cuda", rehearse=True,
    )  # fmt: skip
    assert found["parameters"] == pytest.approx(6.74e9, rel=0.01)
    weights = 4 * found["parameters"] / 1e9
    memory = found["memory"]
    assert memory["params_gb"] == pytest.approx(weights / 8, rel=0.01)
    assert memory["optimizer_gb"] == pytest.approx(2 * weights / 8, rel=0.01)
    assert weights / 2 < memory["total_gb"] < weights and memory["phase"] in ("loss", "backward")
    assert found["layouts"]["one process"] > 4 * weights
    assert set(found["rehearsal_bytes"]) == {"gather", "scatter"}
    assert [row["world"] for row in found["scaling"]] == [1, 2, 4, 8]
    assert 0 < found["scaling"][-1]["efficiency"] < 1 == found["scaling"][0]["efficiency"]


def test_scaling_follows_from_the_assumptions() -> None:
    rows = curve([1, 2], 100.0, 10, {1: 0.0, 2: 40.0}, flops_a_second=50.0, bytes_a_second=10.0, overlap=0.5)
    # Two seconds of computing hide one of four seconds of sending: five seconds a step.
    assert rows[0].step_seconds == 2.0 and rows[1].step_seconds == 5.0
    assert rows[1].efficiency == pytest.approx(0.4) and rows[1].tokens_per_second == pytest.approx(4.0)


def test_modes_in_order() -> None:
    found = planned("fsdp", batch_size=8)["layouts"]
    assert found["fsdp"] < found["ddp, optimiser in shards"] < found["ddp"] < found["one process"] * 1.2
    assert planned("ddp")["traffic_gb"]["reduce"] == pytest.approx(4 * planned("ddp")["parameters"] / 1e9, rel=1e-6)


def test_the_command() -> None:
    out = command("plan", "--preset", "nano", "--world", 8, "--parallel", "fsdp", "--memory", "600MB", "--flops", "1e12")
    assert out.returncode == 0, out.stderr
    assert "10" in out.stdout.split("M parameters")[0] and "8 process(es), fsdp" in out.stdout
    assert "efficiency" in out.stdout and "communication of one process" in out.stdout and "does not fit" in out.stdout
    assert not out.stderr
    numbers = json.loads(command("plan", "--world", 2, "--json").stdout)
    assert numbers["mode"] == "ddp" and numbers["memory"]["total_gb"] > 0
    assert not Path("runs").exists() or "plan" not in {p.name for p in Path("runs").iterdir()}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--world", "0"], "--world '0'"), (["--memory", "lots"], "'lots' is no amount of memory"),
        (["--world", "3", "--shard_size", "2"], "it may be 1, 3"), (["--worlds", "3"], "worlds"),
        (["--world", "3", "--global_batch_size", "16"], "a multiple of 3"),
    ],
)  # fmt: skip
def test_bad_plans(flags: list[str], words: str) -> None:
    out = command("plan", *flags)
    assert out.returncode == 2 and words in out.stderr, out.stderr


def test_amounts() -> None:
    assert parse_bytes("80GiB") == (80 * 2**30, "GiB") and parse_bytes("1.5 gb") == (1.5e9, "GB")
    assert parse_bytes("8e10") == (8e10, "GB") and parse_bytes(500_000) == (5e5, "GB")  # the second from Python
    for text in ("", "GB", "-1GB", "3XB", "12", "0.5"):
        with pytest.raises(ConfigError):
            parse_bytes(text)


def test_the_vocabulary_is_the_one_that_training_would_have(text_file: Path, in_folder: Path) -> None:
    """A preset alone has its own; on a text, the tokenizer's counts, as `treadle train` makes the model."""
    keys = {"preset": "nano", "flops": 1e12}
    own = treadle.plan(None, **keys)["parameters"]
    on_text, on_bytes = (treadle.plan(str(text_file), **keys, **more)["parameters"] for more in ({"tokenizer.vocab_size": 2048}, {"tokenizer": "byte"}))
    assert own - on_text == (8192 - 2048) * 320 and on_text - on_bytes == (2048 - 256) * 320
