"""What is wanted of a model: an objective turns a forward pass into named sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from treadle.data.batch import Batch
from treadle.models.base import Model
from treadle.registry import Registry

CountUnit = Literal["labels", "tokens", "rows", "documents"]

OBJECTIVES = Registry("objective", {
    "next_token": "treadle.objectives.next_token:NextToken",
    "distill_mixer": "treadle.objectives.distill:MatchMixers",
    "distill_hidden": "treadle.objectives.distill:MatchHidden",
    "distill_logits": "treadle.objectives.distill:MatchLogits",
}, base="treadle.objectives.base:Objective")  # fmt: skip


@dataclass
class LossTerm:
    """One part of a loss: a fresh scalar sum, the unit it is divided by, and its own weight. Only training/step divides."""

    total: Tensor
    unit: CountUnit
    weight: float = 1.0


@dataclass
class Losses:
    """All parts of one forward pass by name, and statistics that ride along."""

    losses: dict[str, LossTerm]
    stats: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """Base of every objective. `main` names the part that is the loss people speak of."""

    main: str
    in_nats = True  # `main` is the cross-entropy of the text, so that bits per byte and perplexity mean something

    def prepare(self, model: Model, device: torch.device) -> None:  # noqa: B027  (most objectives have nothing to prepare)
        """Called once before the model is spread over processes and optimisers are made; may freeze parameters."""

    @abstractmethod
    def __call__(self, model: Model, batch: Batch) -> Losses:
        """One forward pass; sums only."""


class ModelWithObjective(nn.Module):
    """A model with its objective: what training wraps, so that head and loss run inside one forward."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, *arguments: Any, work: Callable[..., Any] | None = None) -> Any:
        """The objective's Losses for a batch; with `work`, work(model, ...) instead: whatever reads weights that are in
        shards has to happen inside this call."""
        return (work or self.objective)(self.model, *arguments)


# FSDP finds the tensors that backward starts from by walking the output as a pytree.
pytree.register_pytree_node(
    LossTerm, lambda p: ([p.total], (p.unit, p.weight)), lambda totals, rest: LossTerm(next(iter(totals)), *rest)
)
pytree.register_pytree_node(Losses, lambda p: ([p.losses, p.stats], None), lambda values, _: Losses(*values))
