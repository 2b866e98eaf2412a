"""DeepSpeed: its file as configuration, and (where it is installed) its step against DDP's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import flags, treadle
from tests.several import run_in
from treadle.distributed import deepspeed_json
from treadle.errors import ConfigError
from treadle.recipe import Layer, compose

from .test_trainer import Keys, agree, build, checkpoint, stopped_at, text, train  # noqa: F401  (text is a fixture)


def write(folder: Path, table: dict[str, Any]) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(table))
    return str(path)


FULL = {
    "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2, "train_batch_size": 6,
    "gradient_clipping": 0.5, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.8, 0.9], "eps": 1e-7, "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7, "total_num_steps": 70}},
}  # fmt: skip


def test_the_file_supplies_what_nothing_else_sets(tmp_path: Path) -> None:
    path = write(tmp_path, FULL)
    recipe = compose([Layer({"deepspeed_config": path, "batch_size": "3"}, "flag", from_text=True)])
    t, o = recipe.train, recipe.optim
    assert (t.per_device_train_batch_size, t.gradient_accumulation_steps, t.global_batch_size) == (3, 2, 6)
    assert (t.precision, t.max_steps, o.max_grad_norm) == ("bf16", 70, 0.5)
    assert (o.learning_rate, o.adam_beta1, o.adam_beta2, o.adam_epsilon, o.weight_decay) == (2e-4, 0.8, 0.9, 1e-7, 0.01)
    assert (o.lr_scheduler_type, o.warmup_steps, o.min_lr_ratio) == ("linear", 7, 0.0)
    assert recipe.origins["optim.learning_rate"] == path
    plain = compose([Layer({"deepspeed": write(tmp_path, {"train_batch_size": "auto", "bf16": {"enabled": "auto"}})}, "x")])
    assert plain.train.global_batch_size is None and plain.train.precision == "auto"
    assert compose([Layer({"deepspeed": write(tmp_path, {})}, "x")]).train.precision == "fp32"


@pytest.mark.parametrize(
    "table, flags, words",
    [
        (FULL, {"batch_size": "4"}, r"per_device_train_batch_size = 4 \(flag: batch_size\) contradicts .*ds.json, which says 3"),
        (FULL, {"precision": "fp32"}, "contradicts"),
        (FULL, {"lr": "1e-3"}, "learning_rate = 0.001"),
        ({**FULL, "train_batch_size": 7}, {}, r"train_batch_size = 7, but 3 \(micro\) x 2 \(accumulation\) x 1"),
        ({"optimizer": {"type": "Lamb"}}, {}, "Lamb"),
        ({"scheduler": {"type": "OneCycle"}}, {}, "OneCycle"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, "enable one"),
        ({"gradient_clipping": -1}, {}, "max_grad_norm"),
        ({}, {"parallel.mode": "fsdp"}, "leave one of the two out"),
    ],
)
def test_what_contradicts_is_an_error(tmp_path: Path, table: dict, flags: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose([Layer({"deepspeed": write(tmp_path, table), **flags}, "flag", from_text=True)])


def test_a_missing_or_broken_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        compose([Layer({"deepspeed": str(tmp_path / "no.json")}, "flag")])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        compose([Layer({"deepspeed": str(tmp_path / "bad.json")}, "flag")])


def test_what_deepspeed_is_given() -> None:
    made = deepspeed_json.complete(None, micro=2, accumulation=3, world=4, precision="bf16", max_grad_norm=1.0)
    assert made == {
        "zero_optimization": {"stage": 2}, "train_batch_size": 24, "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3, "gradient_clipping": 1.0, "bf16": {"enabled": True},
    }  # fmt: skip
    kept = deepspeed_json.complete(FULL, micro=3, accumulation=2, world=1, precision="fp32", max_grad_norm=0.5)
    assert kept["bf16"] == {"enabled": False} and kept["zero_optimization"] == {"stage": 1} and "optimizer" not in kept


def test_without_the_package_the_error_names_the_extra(text: str, tmp_path: Path) -> None:  # noqa: F811
    blocked = tmp_path / "deepspeed.py"
    blocked.write_text("raise ImportError('not here')")
    out = treadle("train", text, "--parallel", "deepspeed", "--output_dir", tmp_path / "r", PYTHONPATH=str(tmp_path))
    assert out.returncode == 2 and "treadle[deepspeed]" in out.stderr, out.stderr


# ---- with the package ----


def needs_deepspeed() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'treadle[deepspeed]'")


def keys_for(folder: Path, stage: int, **more: Any) -> Keys:
    return {"deepspeed": write(folder, {"zero_optimization": {"stage": stage}, **more}), "max_steps": 8, "save_steps": 4}


def test_one_process_that_no_launcher_started(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """DeepSpeed refuses to start without LOCAL_RANK, which only launchers set."""
    needs_deepspeed()
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    out = treadle("train", text, *flags(max_steps=2, optim__name="adamw"), "--parallel", "deepspeed", "--output_dir", tmp_path / "r")
    assert out.returncode == 0, out.stderr
    assert checkpoint(tmp_path / "r", 2).step == 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_equal_ddp(text: str, tmp_path: Path, stage: int) -> None:  # noqa: F811
    needs_deepspeed()
    plain = {"max_steps": 8, "save_steps": 4}
    run_in(2, train, text, tmp_path / "ddp", {**plain, "parallel.mode": "ddp"})
    run_in(2, train, text, tmp_path / "ds", keys_for(tmp_path, stage))
    agree(tmp_path / "ds", tmp_path / "ddp", 2e-5)
    assert json.loads((tmp_path / "ds" / "deepspeed.json").read_text())["train_batch_size"] == 8
    ours, theirs = (checkpoint(tmp_path / name, 8) for name in ("ds", "ddp"))
    for stem in ("model", "optimizer"):
        assert ours.tensors(stem).keys() == theirs.tensors(stem).keys()


def test_a_run_moves_to_deepspeed_and_back(text: str, tmp_path: Path) -> None:  # noqa: F811
    needs_deepspeed()
    train(text, tmp_path / "whole", {"max_steps": 24, "save_steps": 4, "eval_steps": 12})
    for leg, mode in enumerate(({}, {"parallel.mode": "deepspeed"}, {"parallel.mode": "ddp"}, None, {"parallel.mode": "fsdp"}, {})):
        mode = keys_for(tmp_path, 3) if mode is None else mode
        keys = {**mode, "max_steps": 24, "save_steps": 4, "eval_steps": 12}
        if mode:
            run_in(2, stopped_at, text, tmp_path / "moved", keys, 4 * (leg + 1), leg > 0)
        else:
            stopped_at(text, tmp_path / "moved", keys, 4 * (leg + 1), leg > 0)
    agree(tmp_path / "moved", tmp_path / "whole", 2e-5)


def test_bf16_and_a_generated_file(text: str, tmp_path: Path) -> None:  # noqa: F811
    needs_deepspeed()
    run_in(2, train, text, tmp_path / "ds", {"parallel.mode": "deepspeed", "precision": "bf16", "max_steps": 6})
    run_in(2, train, text, tmp_path / "ddp", {"parallel.mode": "ddp", "precision": "bf16", "max_steps": 6})
    agree(tmp_path / "ds", tmp_path / "ddp", 3e-2)
    assert json.loads((tmp_path / "ds" / "deepspeed.json").read_text())["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("why", ["spike", "gradient"])
def test_a_step_that_is_skipped_leaves_nothing_behind(text: str, tmp_path: Path, stage: int, why: str) -> None:  # noqa: F811
    needs_deepspeed()
    run_in(2, skip_one, text, tmp_path / "ds", keys_for(tmp_path, stage), why)
    run_in(2, skip_one, text, tmp_path / "ddp", {"parallel.mode": "ddp", "max_steps": 8, "save_steps": 4}, why)
    agree(tmp_path / "ds", tmp_path / "ddp", 2e-5, curves=("loss", "tokens"))


def skip_one(text: str, folder: Path, keys: Keys, why: str) -> None:  # noqa: F811
    """A training whose third step is refused: as a spike of the loss, or because one gradient is infinite."""
    made = build(text, folder, keys)
    made.recipe.train.on_spike = "skip"
    if why == "spike":
        made.health.is_spike = lambda loss, warmed_up: made.state.step == 3  # type: ignore[method-assign]
    else:
        weight = dict(made.model.named_parameters())["embedding.weight"]
        weight.register_hook(lambda grad: grad * math.inf if made.state.step == 3 else None)
    assert made.train()["skipped_steps"] == 1
