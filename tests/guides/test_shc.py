"""The guide of multi-stream transformers: its flags, and its values by scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from treadle.errors import ConfigError
from treadle.recipe import compose
from treadle.start import Request


def of(**flags: Any) -> Any:
    return compose(Request(None, flags).layers())


def test_its_flags() -> None:
    recipe = of(model_size="3b", use_fsdp="true", mixed_precision="bf16", log_steps="5", use_tensorboard="true", use_wandb="true")
    assert (recipe.arch, recipe.preset, recipe.parallel.mode, recipe.train.precision) == ("shc", "3b", "fsdp", "bf16")
    assert recipe.log.logging_steps == 5 and recipe.log.report_to == ["csv", "jsonl", "tensorboard", "wandb"]
    assert of(**{"model-size": "1b"}).arch == "shc" and of(**{"model_size": "1B", "model.arch": "ssm"}).arch == "ssm"
    assert of(model_size="gpt2-medium").arch == "transformer"
    assert of(model_size="500m", use_ddp="true").parallel.mode == "ddp"
    with pytest.raises(ConfigError, match=r"parallel\.mode is given twice"):
        of(use_ddp="true", use_fsdp="true")
    assert of(use_ddp="false", use_fsdp="true").parallel.mode == "fsdp"


@pytest.mark.parametrize(
    ("flags", "sinks"),
    [
        ({"use_wandb": "true"}, ["csv", "jsonl", "tensorboard", "wandb"]),
        ({"use_wandb": "false"}, ["csv", "jsonl", "tensorboard"]),
        ({"use_tensorboard": "false"}, ["csv", "jsonl"]),
        ({"use_tensorboard": "false", "use_wandb": "true"}, ["csv", "jsonl", "wandb"]),
        ({"use_wandb": "true", "report_to": "csv"}, ["csv", "wandb"]),
        ({"report_to": "csv,wandb", "use_wandb": "false"}, None),
    ],
)
def test_switches_add_to_a_list(flags: dict[str, str], sinks: list[str] | None) -> None:
    for order in (flags, dict(reversed(flags.items()))):
        if sinks is None:
            with pytest.raises(ConfigError, match=r"log\.report_to is given twice"):
                of(**order)
        else:
            assert of(**order).log.report_to == sinks


@pytest.mark.parametrize(
    ("size", "rate", "batch", "warmup"), [("500m", 3e-4, 1024, 2000), ("3b", 3e-4, 1024, 2000), ("7b", 1.5e-4, 512, 4000)]
)
def test_values_by_scale(size: str, rate: float, batch: int, warmup: int, typed: Callable[..., str]) -> None:
    """They are what a preset recommends, and `treadle models --preset` prints them."""
    recipe = compose(Request("austen", {"model_size": size}).layers())
    weakest = compose(Request({"model": {"preset": size, "arch": "shc"}}, {}).layers())
    assert (weakest.optim.learning_rate, weakest.train.global_batch_size) == (rate, batch)
    assert (weakest.optim.warmup_steps, weakest.optim.weight_decay) == (warmup, 0.1)
    assert recipe.optim.learning_rate == 8e-3  # the recipe's own word
    said = typed("models", "--preset", size.upper())
    shown = said.split("\nssm ")[0]
    assert shown.startswith(f"shc {size}: ") and f"optim.learning_rate = {rate}" in shown
    assert f"train.global_batch_size = {batch}" in shown and f"optim.warmup_steps = {warmup}" in shown
    assert "optim.weight_decay = 0.1" in shown and f"--model.preset {size}" in shown


def test_an_unknown_preset(typed: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'gpt2_medium'"):
        typed("models", "--preset", "gpt2-mediun")
