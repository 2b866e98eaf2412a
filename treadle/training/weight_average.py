"""Changes the averages it holds, and on request changes places with the weights: their exponential moving average.

A checkpoint's model is the average, so that whatever reads a checkpoint uses it; the weights that training goes on from are
part of the optimiser's state there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from treadle.ops.sharding import local

WEIGHT, UPDATES = "weight", "ema_updates"  # of the optimiser's state: what is trained, and how many steps the average has seen


class WeightAverage:
    """ema <- d ema + (1 - d) weights after each step, d = min(decay, (1 + t) / (10 + t)) at update t, so that the random start
    does not linger (the warm-up that TensorFlow's ExponentialMovingAverage has)."""

    def __init__(self, parameters: Sequence[tuple[str, nn.Parameter]], decay: float) -> None:
        self.parameters, self.decay, self.updates = dict(parameters), decay, 0
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters}
        self.in_place_of_weights = False

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimiser."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        ours = [local(average) for average in self.averages.values()]
        torch._foreach_lerp_(ours, [local(parameter) for parameter in self.parameters.values()], 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def exchange(self) -> None:
        """The averages and the weights change places."""
        for name, parameter in self.parameters.items():
            average, weight = local(self.averages[name]), local(parameter)
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
        self.in_place_of_weights = not self.in_place_of_weights

    @contextmanager
    def used(self) -> Iterator[None]:
        """The model has the averages inside, if it has not already."""
        if self.in_place_of_weights:
            yield
            return
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def named_averages(self) -> dict[str, Tensor]:
        """name -> the average, wherever it is now. Of the parameter's shape, any shape."""
        return {name: p.detach() for name, p in self.parameters.items()} if self.in_place_of_weights else self.averages

    def state_tensors(self) -> dict[str, Tensor]:
        """ "parameter|key" -> tensor, as Optimizers.state_tensors. Of any shapes."""
        weights = self.averages if self.in_place_of_weights else {name: p.detach() for name, p in self.parameters.items()}
        counted = {f"{name}|{UPDATES}": torch.tensor(float(self.updates)) for name in self.parameters}
        return counted | {f"{name}|{WEIGHT}": weight for name, weight in weights.items()}

    @torch.no_grad()
    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        """From a checkpoint whose model is in place already; one without averages begins them there. Of any shapes."""
        self.in_place_of_weights, self.updates = False, 0
        for name, parameter in self.parameters.items():
            self.averages[name].copy_(parameter)
            if UPDATES in state.get(name, {}):
                self.updates = int(state[name][UPDATES])
        resume_weights(self.parameters, state)


@torch.no_grad()
def resume_weights(parameters: dict[str, nn.Parameter], state: dict[str, dict[str, Tensor]]) -> None:
    """Training goes on from the weights in an optimiser's state, where the checkpoint's model is their average. Of any
    shapes."""
    for name, parameter in parameters.items():
        if (weight := state.get(name, {}).get(WEIGHT)) is not None:
            parameter.copy_(weight)
