"""The functions of the Python interface that are not a class of some room."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from treadle import trusted_code
from treadle.data.batch import IGNORE, Batch
from treadle.errors import ConfigError
from treadle.models.base import Model as BaseModel
from treadle.models.base import Output
from treadle.models.catalogue import MODELS
from treadle.models.pretrained import load_model, load_run
from treadle.monitor.console import Console
from treadle.planning.plan import plan as make_plan
from treadle.recipe import compose
from treadle.start import Request
from treadle.start import train as run_training
from treadle.text.base import Tokenizer
from treadle.training.config import Recipe


class Model(BaseModel, abstract=True):
    """Base of models of one's own, and `Model.load(run | folder)`: a trained model; a preset's name needs pretrained=False and gives random weights."""

    @staticmethod
    def load(
        source: str | Path, device: Any = None, pretrained: bool = True, trust_code: Sequence[str] = ()
    ) -> BaseModel:
        trusted_code.allow(trust_code)
        return load_model(str(source), device, pretrained)


def architectures() -> list[str]:
    """Names of all registered architectures."""
    return MODELS.names()


def load(run: str | Path, trust_code: Sequence[str] = ()) -> tuple[BaseModel, Tokenizer | None]:
    """The trained model and the tokenizer of a run (a folder, a checkpoint, `last`, RUN@best, RUN@STEP); None for a model
    that reads no text. trust_code: the files of code that the run may execute, where it names some and is not this user's
    own."""
    trusted_code.allow(trust_code)
    loaded = load_run(str(run))
    return loaded.model, loaded.tokenizer


def train(
    recipe: str | Path | None = None, *, quiet: bool = False, allow_change: Sequence[str] = (),
    trust_code: Sequence[str] = (), **keys: Any,
) -> dict[str, Any]:  # fmt: skip
    """What `treadle train` does, with keys of the configuration as keyword arguments; returns the summary."""
    request = Request(
        str(recipe) if recipe is not None else None, keys, allow_change=allow_change, flags_are_text=False,
        trust_code=trust_code,
    )  # fmt: skip
    return run_training(request, Console(quiet=quiet))


def plan(
    recipe: str | Path | Recipe | None = None, world: int = 1, trust_code: Sequence[str] = (), **keys: Any
) -> dict[str, Any]:
    """What `treadle plan` says, as numbers. recipe: what `train` takes, or a TrainConfig; keys: of the configuration, or
    flops, bandwidth, overlap, device and rehearse of planning/plan.py."""
    trusted_code.allow(trust_code)
    own = {name: keys.pop(name) for name in ("flops", "bandwidth", "overlap", "device", "rehearse") if name in keys}
    if not isinstance(recipe, Recipe):
        recipe = compose(Request(str(recipe) if recipe is not None else None, keys, flags_are_text=False).layers())
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
