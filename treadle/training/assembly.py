"""Changes the model it is given: puts it on its device, whole or in shards, with its optimisers and the stepper."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from treadle.distributed.base import Strategy
from treadle.distributed.choose import make_strategy, resolve_mode
from treadle.distributed.world import World
from treadle.errors import ConfigError
from treadle.models.base import Model
from treadle.objectives.base import ModelWithObjective, Objective
from treadle.training.config import Recipe
from treadle.training.optim import Optimizers
from treadle.training.resolve import Schedule, check_layout
from treadle.training.step import Stepper


@dataclass
class Assembly:
    """What computes a step."""

    model: Model
    strategy: Strategy
    optimizers: Optimizers
    stepper: Stepper


def assemble(
    model: Model, objective: Objective, recipe: Recipe, plan: Schedule, world: World, device: torch.device, precision: str
) -> Assembly:  # fmt: skip
    """The model, allocated and spread over all processes, ready to take a step. ConfigError for DeepSpeed with an
    average of the weights."""
    module = ModelWithObjective(model, objective)
    strategy = _spread(module, recipe, plan, world, device, precision)
    optimizers = Optimizers(model, recipe.optim, recipe.parallel.shard_optimizer and strategy.mode == "ddp")
    if strategy.engine_owns_step and optimizers.average is not None:
        raise ConfigError("DeepSpeed keeps the weights in parts of its own, which optim.ema does not average; leave one of the two out")
    strategy.attach_optimizers(optimizers.inner)
    stepper = Stepper(
        module, optimizers, seed=recipe.run.seed, precision=precision, max_grad_norm=recipe.optim.max_grad_norm,
        loss_weights=recipe.train.loss_weights, strategy=strategy, attention=recipe.train.attention_backend,
    )  # fmt: skip
    return Assembly(model, strategy, optimizers, stepper)


def _spread(
    module: ModelWithObjective, recipe: Recipe, plan: Schedule, world: World, device: torch.device, precision: str
) -> Strategy:  # fmt: skip
    """The module over all processes, its weights allocated and on their device."""
    model = module.model
    mode = resolve_mode(recipe.parallel, world, model.parameter_count(), device)
    check_layout(precision, mode)
    on_meta = any(p.is_meta for p in model.parameters())
    if mode != "fsdp" and not on_meta:
        model.to(device)
    elif mode != "fsdp":
        model.materialise(recipe.run.seed, device)
    strategy = make_strategy(mode, module, model, world, recipe.parallel, precision=precision,
                             accumulation=plan.accumulation, device=device, micro_batch=plan.micro_batch,
                             max_grad_norm=recipe.optim.max_grad_norm)  # fmt: skip
    if mode == "fsdp" and on_meta:  # no process ever holds the whole model
        home = "cpu" if recipe.parallel.cpu_offload else device
        model.materialise(recipe.run.seed, home)
    return strategy
