"""Changes the weights: one optimiser step, forward and backward over micro-batches, the division of the loss, clipping, the
update.

The only place where a loss is divided: each term's sum over all micro-batches by the global count of its unit, which
depends on the batch alone and is known before the first forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from treadle.data.batch import Batch
from treadle.data.order import model_seed
from treadle.distributed.base import Strategy
from treadle.distributed.world import World
from treadle.errors import ConfigError
from treadle.models.base import merged_stats
from treadle.objectives.base import TOTAL, ModelWithObjective
from treadle.ops.attention import attention_backend
from treadle.ops.host_copy import HostCopy
from treadle.ops.precision import autocast
from treadle.ops.sharding import local
from treadle.registry import nearest
from treadle.training.optim import Optimizers


@dataclass
class StepResult:
    """What one step did. Losses stay tensors so that reading them is the logger's choice."""

    losses: dict[str, Tensor]  # by term, already divided
    counts: dict[str, int]
    grad_norm: float
    skipped: str  # why the update was left out: "" (it was not), "nonfinite" or "spike"
    loss: float = math.nan  # the headline term
    stats: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)  # which count each term was divided by
    loss_scale: float | None = None  # of fp16


@dataclass
class LossScale:
    """Keeps fp16 gradients in range (Micikevicius et al. 2018, arXiv 1710.03740): halved after an overflow, doubled
    after 2000 steps without one. Two numbers, saved with the run."""

    scale: float = 2.0**14
    good_steps: int = 0

    def after(self, finite: bool) -> None:
        """Says how a step ended, so that the scale can follow."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / 2)
        elif self.good_steps == 2000:
            self.scale, self.good_steps = self.scale * 2, 0


class Stepper:
    """Runs optimiser steps on a module, alone or as one of several processes that each have a part of the rows."""

    def __init__(
        self,
        module: ModelWithObjective,
        optimizers: Optimizers,
        *,
        seed: int,
        precision: str,
        max_grad_norm: float,
        loss_weights: dict[str, float],
        strategy: Strategy | None = None,
        attention: str = "auto",
    ) -> None:
        self.attention = attention  # attention_backend
        self.optimizers, self.objective = optimizers, module.objective
        self.strategy = strategy or Strategy(module, World())
        self.seed, self.precision = seed, precision
        self.max_grad_norm, self.loss_weights = max_grad_norm, loss_weights
        self.model, self.device = module.model, module.model.device
        self.loss_scale = LossScale() if precision == "fp16" else None
        self.launches = self.device.type == "cuda" and not self.strategy.engine_owns_step and self.optimizers.decide_on_device

    def run(
        self,
        step: int,
        micro_batches: Sequence[Batch],
        learning_rate: float,
        update: bool = True,
        veto: Callable[[float], bool] | None = None,
    ) -> StepResult:
        """Step number `step`. A loss or gradient that is not finite, or a loss that `veto` refuses, leaves the weights as
        they were (skipped). ConfigError when the loss lacks the objective's headline or, in step 0, a part that has a weight."""
        counts = self._counts(micro_batches)
        if not self.strategy.engine_owns_step:
            self.optimizers.zero_grad()
        module, rank = self.strategy.module, self.strategy.world.rank
        sums: dict[str, Tensor] = {}
        units: dict[str, str] = {}
        weights: dict[str, float] = {}  # the objective's own
        stats = []
        if not (module.training and self.model.training):  # a millisecond for a hundred layers, in which a GPU would wait
            module.train()
        factor = self.strategy.loss_factor * (self.loss_scale.scale if self.loss_scale else 1.0)
        for micro, batch in enumerate(micro_batches):
            torch.manual_seed(model_seed(self.seed, step, micro, rank))
            last = micro + 1 == len(micro_batches)
            with attention_backend(self.attention), self.strategy.no_sync(unless=last):
                with autocast(self.precision, self.device):
                    parts = module(batch.to(self.device, non_blocking=True))
                objective = torch.zeros((), device=self.device)
                for name, part in parts.losses.items():
                    divided = part.total / max(1, _count_of(part.unit, counts))
                    units[name], weights[name] = part.unit, part.weight
                    sums[name] = sums.get(name, 0) + divided.detach()
                    objective = objective + divided * (part.weight * self.loss_weights.get(name, 1.0))
                self.strategy.backward(objective * factor, last)
            stats.append(parts.stats)
        totals = self.strategy.sum_losses(torch.stack([sums[name] for name in sums]))
        sums = dict(zip(sums, totals))
        headline = self.objective.headline
        if headline not in (*sums, TOTAL):
            raise ConfigError(f"the objective's headline is {self.objective.headline!r}, but its loss has the terms "
                              f"{', '.join(sums)}")  # fmt: skip
        if step == 0 and (unknown := sorted(set(self.loss_weights) - set(sums))):
            raise ConfigError(f"loss_weights.{unknown[0]}: {nearest(unknown[0], list(sums))} (the parts of this model's loss)")
        shown = sums[headline] if headline in sums else torch.stack([weights[name] * value for name, value in sums.items()]).sum()
        norm = None if self.strategy.engine_owns_step else self._norm()
        numbers = torch.stack([shown.float(), *totals.float(), *([norm.float()] if norm is not None else [])])
        # Where nobody has a say in it, a GPU gets the update before anybody knows the loss, so that it never waits for the host.
        launched = self.launches and norm is not None and update and veto is None
        reading = HostCopy(numbers)
        if launched:
            self._launch(learning_rate, numbers)
        loss, *values = reading.numbers()  # the one read of a step
        wanted = update and not (veto is not None and veto(loss))
        if norm is None:
            value, finite = self._finish_by_engine(learning_rate, wanted, values)
        else:
            value, finite = self._finish(learning_rate, wanted, values, launched)
        skipped = "nonfinite" if not finite else "spike" if update and not wanted else ""
        scale = self.loss_scale.scale if self.loss_scale is not None else None
        return StepResult(sums, counts, value, skipped, loss, merged_stats(stats), units, scale)

    def _counts(self, micro_batches: Sequence[Batch]) -> dict[str, int]:
        """How many of each unit the whole step has; from the batches alone, so known before the first forward pass."""
        each = [self.objective.counts(batch) for batch in micro_batches]
        names = list(each[0])
        found = self.strategy.world.all_reduce_sum([sum(counts[name] for counts in each) for name in names])
        return {name: int(value) for name, value in zip(names, found)}

    def _gradients(self) -> list[Tensor]:
        return [local(p.grad) for _, p in self.optimizers.parameters if p.grad is not None]

    def _norm(self) -> Tensor:
        """Of all gradients, before clipping; a number on the device."""
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        gradients = self._gradients()
        if not gradients:
            return torch.zeros((), device=self.device)
        return self.strategy.global_norm(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))) / scale

    def _finish_by_engine(self, learning_rate: float, update: bool, losses: list[float]) -> tuple[float, bool]:
        sound = all(math.isfinite(loss) for loss in losses)
        self.optimizers.set_learning_rate(learning_rate)
        norm = self.strategy.step(apply=update and sound)
        return norm, sound and (math.isfinite(norm) or not update)

    def _launch(self, learning_rate: float, numbers: Tensor) -> None:
        """The update, clipped by the norm (the last of the numbers), nothing where one of them is not finite; all on the device."""
        divisor = torch.full_like(numbers[-1], self.loss_scale.scale if self.loss_scale else 1.0)
        if self.max_grad_norm > 0:
            divisor = divisor * ((numbers[-1] + 1e-6) / self.max_grad_norm).clamp_min(1.0)
        self.optimizers.set_learning_rate(learning_rate)
        self.optimizers.step_on_device(divisor, (~numbers[1:].isfinite()).any().float())

    def _finish(self, learning_rate: float, update: bool, values: list[float], launched: bool) -> tuple[float, bool]:
        """values: the losses and, last, the norm, which is not finite when any gradient is not. launched: the update is under way."""
        norm, finite = values[-1], all(math.isfinite(value) for value in values)
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        if not launched:
            if not (gradients := self._gradients()):
                return 0.0, True
            if update and finite:
                clip = self.max_grad_norm / (norm + 1e-6) if 0 < self.max_grad_norm < norm else 1.0
                if clip / scale != 1.0:
                    torch._foreach_mul_(gradients, clip / scale)
                self.optimizers.set_learning_rate(learning_rate)
                self.optimizers.step()
        if update and self.loss_scale is not None:
            self.loss_scale.after(finite)
        return norm, finite


def _count_of(unit: str, counts: dict[str, int]) -> int:
    if unit not in counts:
        raise ConfigError(f"a loss term is divided by {unit!r}, which nobody counts; a batch counts {', '.join(sorted(counts))} "
                          "(Batch.counts, or the objective's counts(batch))")  # fmt: skip
    return counts[unit]
