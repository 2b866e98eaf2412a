"""How a module (model and objective) is computed by one or several processes; this file: by one.

A strategy is what training/step knows of parallelism: the module to call, how backward runs, and two sums. Averages that
torch's engines take over processes are turned into sums by `loss_factor`, since losses are already divided by the count
over all processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treadle.distributed.world import World


class Strategy:
    """One process, nothing spread."""

    mode = "none"
    shards_weights = False  # each process holds a part of the weights
    shards_optimizer = False  # each process holds a part of the optimiser's state
    engine_owns_step = False  # clips and steps by itself (`step`) instead of leaving gradients to treadle
    host_mesh: Any = None

    @property
    def full_weights_need_all_ranks(self) -> bool:
        """A forward pass needs all processes."""
        return self.shards_weights

    def __init__(self, module: torch.nn.Module, world: World) -> None:
        self.world = world
        self.module = module  # training calls this
        self.plain = module  # evaluation calls this: the same weights without gradient communication
        self.loss_factor = 1.0

    def no_sync(self, unless: bool) -> AbstractContextManager[Any]:
        """The context of one micro-batch; `unless` is true for the one after which the optimiser steps."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of a micro-batch's loss, a scalar; `last`: of a step."""
        loss.backward()

    def attach_optimizers(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Hands over the optimisers, before the first step."""

    def step(self, apply: bool) -> float:
        """Of a strategy that owns its step: the update (or none), and the norm of the gradients."""
        raise NotImplementedError

    def files(self) -> dict[str, Any]:
        """Name -> table, of what the strategy was configured with; kept in the run."""
        return {}

    def gather_full_state(
        self, weights: dict[str, Tensor], state: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and optimiser state as a checkpoint holds them; where one process writes it, on that one at least. Of
        any shapes."""
        return weights, state

    def load_full_state(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
        """Takes over weights and state of a checkpoint; False leaves it to the model and the optimisers. Of any shapes."""
        return False

    def global_norm(self, norm: Tensor) -> Tensor:
        """The norm over all parts of what this process has a part of. A scalar."""
        return norm

    def sum_losses(self, values: Tensor) -> Tensor:
        """Sums over the processes' different rows. Of any shape."""
        if self.world.size > 1:
            dist.all_reduce(values)
        return values

    def with_full_weights(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """work(model, *arguments) on the current weights, as every process does at the same moment where weights are in
        shards."""
        return self.plain(*arguments, work=work)
