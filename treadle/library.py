"""The functions of the Python interface that are not a class of some room."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from treadle.data.batch import IGNORE, Batch
from treadle.errors import ConfigError
from treadle.models.base import Model as BaseModel
from treadle.models.base import Output
from treadle.models.catalogue import MODELS
from treadle.models.pretrained import load_model, load_run
from treadle.monitor.console import Console
from treadle.planning.plan import plan as make_plan
from treadle.recipe import compose
from treadle.registry import nearest
from treadle.settings import shown
from treadle.start import Request
from treadle.start import train as run_training
from treadle.text.base import Tokenizer
from treadle.training.config import Recipe

PLAN_KEYS = ("flops", "bandwidth", "overlap", "memory", "device", "rehearse")


class Model(BaseModel):
    """`Model.load(run | folder)`: a trained model; a preset's name needs pretrained=False and gives random weights."""

    @staticmethod
    def load(source: str | Path, device: Any = None, pretrained: bool = True, **keys: Any) -> BaseModel:
        for key, value in keys.items():
            raise ConfigError(f"Model.load: {key} = {shown(value)}: {nearest(key, ['source', 'device', 'pretrained'])} A model's "
                              "own keys are kept with its weights; treadle.build(arch, preset, key=value) makes another one")  # fmt: skip
        return load_model(str(source), device, pretrained)


def architectures() -> list[str]:
    """Names of all registered architectures."""
    return MODELS.names()


def load(run: str | Path) -> tuple[BaseModel, Tokenizer]:
    """The trained model and the tokenizer of a run (a folder, a checkpoint, `last`, RUN@best, RUN@STEP)."""
    loaded = load_run(str(run))
    return loaded.model, loaded.tokenizer


def _target(recipe: Any) -> str | Mapping[str, Any] | None:
    """What `train` and `plan` take, as a request has it; of a TrainConfig what was set in it."""
    if recipe is None or isinstance(recipe, Mapping):
        return recipe
    if isinstance(recipe, Recipe):
        return recipe.set_values()
    if isinstance(recipe, (str, os.PathLike)):
        return os.fspath(recipe)
    raise ConfigError(f"recipe = {shown(recipe)}: give a recipe's or text's path, a dictionary of keys, or a treadle.TrainConfig")


def train(
    recipe: str | Path | Recipe | Mapping[str, Any] | None = None, *, quiet: bool = False, allow_change: Sequence[str] = (),
    **keys: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `treadle train` does, with keys of the configuration as keyword arguments; returns the summary. recipe: a
    path, a built-in name, a recipe's table as a dictionary, or a TrainConfig. ConfigError for keys that there are not."""
    request = Request(_target(recipe), keys, allow_change=allow_change, flags_are_text=False,
                      other_flags=("quiet", "allow_change"))  # fmt: skip
    return run_training(request, Console(quiet=quiet))


def plan(
    recipe: str | Path | Recipe | Mapping[str, Any] | None = None, world: int | None = None, **keys: Any
) -> dict[str, Any]:
    """What `treadle plan` says, as numbers; prints nothing. recipe: what `train` takes; keys: of the configuration, or
    flops, bandwidth, overlap, memory, device and rehearse of planning/plan.py."""
    own = {name: keys.pop(name) for name in PLAN_KEYS if name in keys}
    if not isinstance(recipe, Recipe) or keys:
        request = Request(_target(recipe), keys, flags_are_text=False, other_flags=("world", *PLAN_KEYS))
        recipe = compose(request.layers())
    return make_plan(recipe, world, **own)


def loss(out: Output, batch: Batch) -> tuple[Tensor, int]:
    """(sum of nats over labels, number of labels); the caller divides, over as many batches as it likes."""
    import torch.nn.functional as F

    if batch.labels is None or out.logits is None:
        raise ConfigError("loss needs logits and labels; make the batch with Batch.for_training(ids)")
    total = F.cross_entropy(
        out.logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return total, batch.counts["labels"]
