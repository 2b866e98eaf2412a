"""An objective whose loss or metrics somebody else computes: the methods that a Trainer's subclass overrides."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.objectives.base import Losses, LossTerm, Objective

METHODS = ("compute_loss", "compute_metrics")


def with_overrides(objective: Objective, owner: Any, base: type) -> Objective:
    """`objective`, or a copy of it that asks `owner` for what its class overrides of `base`'s methods."""
    overridden = [name for name in METHODS if getattr(type(owner), name) is not getattr(base, name)]
    if not overridden:
        return objective
    methods: dict[str, Any] = {}
    if "compute_loss" in overridden:
        methods["__call__"] = lambda self, model, batch: as_losses(owner.compute_loss(model, batch), self, batch)
    if "compute_metrics" in overridden:
        methods["compute_metrics"] = lambda self, sums: owner.compute_metrics(sums)
    made = copy.copy(objective)
    made.__class__ = type(type(objective).__name__, (type(objective),), methods)
    return made


def as_losses(found: Losses | Tensor, objective: Objective, batch: Batch) -> Losses:
    """Losses as they are; one number is taken as the mean over the batch's labels, or over its rows where it has none.
    A number is a scalar; ConfigError for anything else."""
    if isinstance(found, Losses):
        return found
    if not isinstance(found, Tensor) or found.dim():
        raise ConfigError("compute_loss has to return treadle.Losses or one number (a tensor without dimensions)")
    counts = objective.counts(batch)
    unit = "labels" if batch.labels is not None and "labels" in counts else "rows"
    # A micro-batch of padding alone has a mean of nothing, which is not a number.
    total = found * counts[unit] if counts[unit] else found.nan_to_num() * 0
    return Losses({objective.headline: LossTerm(total, unit)})
