"""How good a model is on data it was not trained on: batches go through the objective, whose sums become its metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from treadle.data.base import Dataset
from treadle.data.batch import Batch
from treadle.distributed.base import Strategy
from treadle.distributed.world import World
from treadle.errors import InputError
from treadle.generation.mode import evaluating
from treadle.layers.quantized_linear import rounded_products
from treadle.models.base import Model
from treadle.objectives.base import Objective
from treadle.objectives.next_token import NextToken
from treadle.ops.precision import autocast
from treadle.text.base import Tokenizer

INSPECTED_ROWS = 4


class Evaluator:
    """Evaluates one model.

    tokenizer: says how many bytes a label stands for, for data that does not count them. objective: whose metrics; next
    token without one. precision: what the model was trained in. strategy: how it is spread over processes.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        precision: str = "fp32",
        strategy: Strategy | None = None,
        objective: Objective | None = None,
    ) -> None:
        self.model, self.precision, self.strategy = model, precision, strategy
        self.objective = objective or NextToken(tokenizer=tokenizer)

    def evaluate(
        self,
        data: Dataset,
        batch_size: int = 16,
        rows: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """The objective's metrics over the data; of next-token prediction loss (nats a label), bpb, perplexity, accuracy,
        top5_accuracy, and the labels and bytes they are over.

        `rows` takes that many rows spread over the data. None when `should_stop` turned true on the way.
        InputError for data without a row.
        """
        self.objective.begin_evaluation(data)
        batches = data.in_sequence(batch_size, rows)
        if not len(batches):
            raise InputError("there is no row to evaluate on")
        world = self.strategy.world if self.strategy is not None else World()
        sums: list[dict[str, float]] = []
        with evaluating(self.model):
            # Batch b is process b mod W's. One without a batch left repeats one and counts nothing: shards are gathered
            # by all or none.
            for first in range(0, len(batches), world.size):
                if should_stop():
                    return None
                mine = first + world.rank
                found = self.batch_sums(batches[mine if mine < len(batches) else 0])
                sums.append(found if mine < len(batches) else dict.fromkeys(found, 0.0))
        return self.objective.compute_metrics(added_up(world, sums))

    def batch_sums(self, batch: Batch) -> dict[str, float]:
        """What the objective adds up over one batch."""
        with rounded_products():  # of a model in fewer bits, rows of every length
            return self._with_full_weights(self._batch_sums, batch)

    def inspect(self, data: Dataset) -> dict[str, float]:
        """The model's own numbers (`Model.inspect`) on the first rows of `data`, the same for any number of processes."""
        if type(self.model).inspect is Model.inspect:
            return {}
        return self._with_full_weights(self._inspect, data.in_sequence(INSPECTED_ROWS, INSPECTED_ROWS)[0])

    def _with_full_weights(self, work: Callable[[Model, Batch], dict[str, float]], batch: Batch) -> dict[str, float]:
        return work(self.model, batch) if self.strategy is None else self.strategy.with_full_weights(work, batch)

    @torch.no_grad()
    def _inspect(self, model: Model, batch: Batch) -> dict[str, float]:
        with autocast(self.precision, model.device):
            return model.inspect(batch.to(model.device))

    @torch.no_grad()
    def _batch_sums(self, model: Model, batch: Batch) -> dict[str, float]:
        with autocast(self.precision, model.device):
            found = self.objective.evaluation_sums(model, batch.to(model.device))
        return {name: float(value) for name, value in found.items()}

    def compare_checkpoints(self, paths: list[str], data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """One row of metrics a checkpoint, its weights loaded into this model; the model's own weights come back."""
        from treadle.checkpoint.reader import Checkpoint

        kept = {name: tensor.detach().clone() for name, tensor in self.model.trained_weights().items()}
        table = []
        try:
            for path in paths:
                checkpoint = Checkpoint(path)
                self.model.load_weights(checkpoint.tensors("model"))
                table.append({"checkpoint": path, "step": checkpoint.step, **(self.evaluate(data, batch_size) or {})})
        finally:
            self.model.load_weights(kept)
        return table


def added_up(world: World, sums: Sequence[dict[str, float]]) -> dict[str, float]:
    """All processes' batches, added up in the order of the batches, whoever computed them: the same bits for any number of
    processes."""
    names = list(sums[0])
    parts = world.all_gather_object([[batch[name] for name in names] for batch in sums])
    columns = zip(*(part[i] for i in range(len(sums)) for part in parts))
    return {name: math.fsum(values) for name, values in zip(names, columns)}
