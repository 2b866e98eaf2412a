"""Runs with adapters: only they are trained and saved, a resumed run is the same bit for bit, and the base is known by place
and checksum."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_resume import finish, same_end, start
from treadle.checkpoint.layout import checkpoint_name
from treadle.checkpoint.reader import Checkpoint
from treadle.checkpoint.writer import remove_tree
from treadle.data.batch import Batch
from treadle.errors import CheckpointError, ConfigError, InputError
from treadle.layers.lora import is_adapter
from treadle.library import train
from treadle.models.adapters import add_adapters, load_base
from treadle.models.base import build, count_label
from treadle.models.pretrained import load_run, plain_weights, read_adapters, whole_weights
from treadle.models.settings import AdapterSettings
from treadle.monitor.console import Console
from treadle.start import Request
from treadle.start import train as start_train
from treadle.training.adapting import trained_share

KEYS: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "seq_len": 32, "batch_size": 4, "tokenizer.name": "byte",
                        "logging_steps": 1, "sample_tokens": 0, "eval_rows": 4, "max_steps": 6}  # fmt: skip
RUN: dict[str, Any] = {k: v for k, v in KEYS.items() if k not in ("hidden_size", "num_layers", "num_heads")}
LORA: dict[str, Any] = {"lora_rank": 4, "lora_dropout": 0.1, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A trained transformer."""
    folder = tmp_path_factory.mktemp("base") / "base"
    train(str(text_file), quiet=True, output_dir=str(folder), **KEYS)
    return folder


@pytest.fixture(scope="module")
def other_text(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.txt"
    path.write_text(text_file.read_text().upper())
    return path


def run_line(text: Path, base: Path, folder: Path, **keys: object) -> list[str]:
    """For a process of its own."""
    return [sys.executable, "-m", "treadle", "train", str(text), "--from", str(base), "--output_dir", str(folder),
            *(part for key, value in {**RUN, **LORA, **keys}.items() for part in (f"--{key}", str(value)))]  # fmt: skip


def fine_tuned(base: Path, text: Path, folder: Path, console: Console | None = None, whole: bool = False, **keys: object) -> Path:
    """A run that starts from `base`, trained in this process; whole: without adapters."""
    keys = {**RUN, **({} if whole else LORA), "output_dir": str(folder), **keys}
    start_train(Request(str(text), keys, weights_from=str(base), flags_are_text=False), console or Console(quiet=True, silent=True))
    return folder


@pytest.fixture(scope="module")
def adapted(base: Path, other_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tuned(base, other_text, tmp_path_factory.mktemp("adapted") / "run")


def test_a_checkpoint_holds_the_adapters_alone_and_the_base_by_place_and_checksum(base: Path, adapted: Path) -> None:
    checkpoint = Checkpoint(adapted / "checkpoints" / checkpoint_name(6))
    tensors = checkpoint.tensors("model")
    assert tensors and all(is_adapter(name) for name in tensors)
    assert all(is_adapter(name.partition("|")[0]) for name in checkpoint.tensors("optimizer"))
    settings = read_adapters(checkpoint)
    assert settings is not None and settings.lora_rank == 4
    assert settings.base_model == str((base / "checkpoints" / checkpoint_name(6)).resolve())
    whole = Checkpoint(settings.base_model).manifest["files"]["model.safetensors"]["bytes"]
    assert checkpoint.manifest["files"]["model.safetensors"]["bytes"] < whole / 2


def test_the_run_is_loaded_with_its_adapters_merged(base: Path, adapted: Path) -> None:
    """To 1e-5 the model that was trained: adapters beside their base, as the trainer holds them."""
    loaded = load_run(str(adapted))
    checkpoint = loaded.checkpoint
    model = load_run(str(base)).model
    settings = read_adapters(checkpoint)
    assert settings is not None
    before = {name: tensor.clone() for name, tensor in model.named_weights().items()}
    add_adapters(model, settings)
    load_base(model, dict(before))
    model.load_weights(checkpoint.tensors("model"))
    batch = Batch.from_ids(torch.arange(40).reshape(2, 20))
    with_adapters, whole = model.eval()(batch).logits, loaded.model(batch).logits
    torch.testing.assert_close(whole, with_adapters, atol=1e-5, rtol=0)
    assert not loaded.model.adapted and loaded.model.named_weights().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.named_weights().items() if "norm" in name or name == "embedding.weight")
    last = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()][-1]
    from treadle.evaluation.report import evaluate_run

    assert evaluate_run(str(adapted), rows=4)["metrics"]["loss"] == pytest.approx(last["loss"], abs=1e-4)


def test_the_share_that_is_trained_is_said(base: Path, other_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine_tuned(base, other_text, tmp_path / "run", Console(), max_steps=1, lora_targets=["query", "value"])
    said = next(line for line in capsys.readouterr().out.splitlines() if "trainable" in line)
    count = 2 * 2 * (4 * 32 + 32 * 4)  # of each of two layers query and value
    whole = load_run(str(base)).model.parameter_count() + count
    assert f"trainable {count_label(count)} of {count_label(whole)} ({count / whole:.1%})" in said, said
    assert f": {16 * count / 1e6:.1f} MB with gradients and moments, beside {4 * (whole - count) / 1e6:.1f} MB of frozen weights" in said, said


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_the_memory_that_is_said_is_what_a_step_holds(kind: str) -> None:
    """In MB: adapters with gradients and moments as they are after a step, and the frozen weights as they are held."""
    model = build("transformer", vocab_size=256, hidden_size=192, num_layers=2, num_heads=2)
    add_adapters(model, AdapterSettings(lora_rank=16, base_precision=kind))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    logits = model.train()(Batch.from_ids(torch.arange(40).reshape(2, 20))).logits
    assert logits is not None
    logits.square().mean().backward()
    optimizer.step()
    tensors = [t for p in trained for t in (p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]
    ours, frozen = (sum(t.numel() * t.element_size() for t in some) / 1e6 for some in (tensors, [p for p in model.parameters() if not p.requires_grad]))
    assert ours > 1 and frozen > (3 if kind == "fp32" else 1)
    assert trained_share(model).endswith(f": {ours:.1f} MB with gradients and moments, beside {frozen:.1f} MB of frozen weights")


def test_dropout_that_is_not_applied_is_said(base: Path, text_file: Path, other_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(str(text_file), quiet=True, output_dir=str(tmp_path / "inl"), **{**KEYS, "arch": "inl", "max_steps": 1})

    def notes(of: Path, name: str, **keys: object) -> list[str]:
        capsys.readouterr()
        fine_tuned(of, other_text, tmp_path / name, Console(), max_steps=1, **keys)
        return [line for line in capsys.readouterr().out.splitlines() if "lora_dropout" in line]

    (said,) = notes(tmp_path / "inl", "one")
    assert said.startswith("note: lora_dropout = 0.1 is not applied in dynamics.controller_in, dynamics.controller_out (4 of 18 adapters)"), said
    assert notes(tmp_path / "inl", "two", lora_dropout=0.0) == [] and notes(tmp_path / "inl", "three", lora_targets=["query"]) == []
    assert notes(base, "four") == []  # a transformer has none of them


@pytest.mark.parametrize(
    "keys",
    [{"gradient_accumulation_steps": 2, "batch_size": 2},
     pytest.param({"base_precision": "int8", "gradient_checkpointing": "true"}, marks=pytest.mark.slow),
     pytest.param({"base_precision": "bf16", "optim.name": "muon", "ema": 0.9}, marks=pytest.mark.slow)],
    ids=["accumulation", "int8-checkpointing", "bf16-muon-average"],
)  # fmt: skip
def test_killed_and_continued_it_is_the_same_bit_for_bit(base: Path, other_text: Path, tmp_path: Path, keys: dict[str, object]) -> None:
    keys = {"max_steps": 12, "save_steps": 3, **keys}
    finish(run_line(other_text, base, tmp_path / "whole", **keys))
    line, metrics = run_line(other_text, base, tmp_path / "killed", **keys), tmp_path / "killed" / "metrics.jsonl"
    for rows in (5,) if "base_precision" not in keys else (4, 9):
        process, deadline = start(line), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= rows):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    out = finish(line)
    assert "Resumed from step" in out or "is finished" in out
    same_end(tmp_path / "whole", tmp_path / "killed", 12)


def test_a_moved_base_is_named_and_may_be_said_anew(base: Path, other_text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own)
    run = fine_tuned(own, other_text, tmp_path / "run", max_steps=2)
    own.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"frozen model of .*run is not where it was .*own.*--base_model"):
        load_run(str(run))
    with pytest.raises(InputError, match=r"frozen model of this run .*own.*--base_model"):
        fine_tuned(tmp_path / "elsewhere", other_text, run, max_steps=3)
    fine_tuned(tmp_path / "elsewhere", other_text, run, max_steps=3, base_model=str(tmp_path / "elsewhere"))
    assert read_adapters(load_run(str(run)).checkpoint) is not None  # the run knows the place now


def test_a_base_with_other_weights_is_refused(base: Path, other_text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(base, own)
    run = fine_tuned(own, other_text, tmp_path / "run", max_steps=2)
    place = own / "checkpoints" / checkpoint_name(6)
    remove_tree(str(place))
    fine_tuned(base, other_text, own / "x", whole=True, max_steps=1)
    (own / "x" / "checkpoints" / checkpoint_name(1)).rename(place)
    with pytest.raises(CheckpointError, match=r"has other weights than the frozen model of .*adapters work with the weights"):
        load_run(str(run))


def test_without_a_base_there_is_nothing_to_adapt(other_text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add --from RUN"):
        train(str(other_text), quiet=True, output_dir=str(tmp_path / "run"), **KEYS, **LORA)


def test_what_the_adapters_are_is_fixed_for_a_run(base: Path, other_text: Path, adapted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    with pytest.raises(ConfigError, match=r"adapter\.lora_rank was 4"):
        fine_tuned(base, other_text, run, max_steps=8, lora_rank=8)


def test_a_run_with_adapters_is_a_model_to_start_from(adapted: Path, other_text: Path, tmp_path: Path) -> None:
    """Whole, or with adapters of its own on top: both begin where that run ended."""
    whole = whole_weights(load_run(str(adapted)).checkpoint)
    tuned = load_run(str(fine_tuned(adapted, other_text, tmp_path / "more", max_steps=1, learning_rate=1e-9)))
    for name, tensor in tuned.model.named_weights().items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-6)
    fine_tuned(adapted, other_text, tmp_path / "all", whole=True, max_steps=1, learning_rate=1e-9)
    full = load_run(str(tmp_path / "all"))
    assert read_adapters(full.checkpoint) is None and not any(is_adapter(name) for name in full.checkpoint.tensors("model"))
    for name, tensor in full.model.named_weights().items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-5, rtol=1e-5)


def test_it_learns_what_the_base_does_not_know(base: Path, other_text: Path, tmp_path: Path) -> None:
    run = fine_tuned(base, other_text, tmp_path / "run", max_steps=60, eval_steps=30, learning_rate=0.02, eval_rows=16)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "split" not in row]
    assert max(losses[-5:]) < losses[0] - 0.15, losses


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_several_processes_train_the_same_adapters(base: Path, other_text: Path, tmp_path: Path, mode: str, kind: str) -> None:
    keys = {"max_steps": 4, "base_precision": kind, "lora_dropout": 0.0, "seed": 3}
    one = fine_tuned(base, other_text, tmp_path / "one", **keys)
    two = tmp_path / "two"
    finish(run_line(other_text, base, two, **{**keys, "batch_size": 2, "devices": 2, "parallel": mode}))
    wanted, found = (load_run(str(run)).checkpoint.tensors("model") for run in (one, two))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3, msg=name)


def test_a_model_of_transformers_is_a_base(tmp_path: Path, other_text: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                      num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "llama")
    run = fine_tuned(tmp_path / "llama", other_text, tmp_path / "run", max_steps=3, lora_targets=["q_proj", "v_proj"])
    loaded = load_run(str(run))
    tensors = loaded.checkpoint.tensors("model")
    assert sorted({name.split(".")[3] for name in tensors}) == ["query", "value"]
    weights, _ = plain_weights(loaded.checkpoint)
    settings = AdapterSettings.of(loaded.config)
    assert settings is not None and settings.base_model == str((tmp_path / "llama").resolve())
    own = theirs.state_dict()["model.layers.1.self_attn.k_proj.weight"]
    torch.testing.assert_close(weights["layers.1.attention.key.weight"], own)


def test_flags_alone_name_the_keys() -> None:
    from treadle.recipe import Layer, compose

    made = compose([Layer({"r": "8", "lora_alpha": "16", "lora_dropout": "0.05", "target_modules": "q_proj,v_proj", "use_rslora": "true",
                           "base_dtype": "bfloat16"}, "flag", from_text=True)]).adapter  # fmt: skip
    assert (made.lora_rank, made.lora_alpha, made.lora_dropout, made.use_rslora, made.base_precision) == (8, 16.0, 0.05, True, "bf16")
    assert made.lora_targets == ["q_proj", "v_proj"]
    made = compose([Layer({"use_peft": "true", "load_in_8bit": "true", "target_modules": "all"}, "flag", from_text=True)]).adapter
    assert (made.lora_rank, made.base_precision, made.lora_targets) == (16, "int8", ["all-linear"])
    assert compose([Layer({"use_peft": "true", "r": "2"}, "flag", from_text=True)]).adapter.lora_rank == 2


def test_a_student_with_adapters(base: Path, other_text: Path, tmp_path: Path) -> None:
    """Distillation starts from the model of --from, and its last stage from the stage before."""
    from treadle.distillation import distill

    keys = {**RUN, **LORA, "output_dir": str(tmp_path / "run"), "distill.teacher": str(base), "model.arch": "transformer", "max_steps": 3}
    distill(Request(str(other_text), keys, weights_from=str(base), flags_are_text=False), Console(quiet=True, silent=True))
    last = load_run(str(tmp_path / "run")).checkpoint
    settings = read_adapters(last)
    assert settings is not None and all(is_adapter(name) for name in last.tensors("model"))
    assert Path(str(settings.base_model)).parts[-4:-2] == ("stages", "mixer")


def test_a_base_that_trains_on_keeps_what_the_adapters_need(text_file: Path, other_text: Path, tmp_path: Path) -> None:
    keys = {**KEYS, "max_steps": 2, "save_total_limit": 1, "eval_steps": 100}
    train(str(text_file), quiet=True, output_dir=str(tmp_path / "base"), **keys)
    run = fine_tuned(tmp_path / "base", other_text, tmp_path / "run", max_steps=2)
    train(str(text_file), quiet=True, output_dir=str(tmp_path / "base"), **{**keys, "max_steps": 6, "save_steps": 1})
    assert load_run(str(run)).model.adapted is False
    assert fine_tuned(tmp_path / "base", other_text, run, max_steps=3) == run
