"""How good a model is on text it was not trained on. The one place where evaluation sums become metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from treadle.data.batch import IGNORE, Batch
from treadle.data.dataset import Dataset
from treadle.distributed.base import Strategy
from treadle.distributed.world import World
from treadle.models.base import Model
from treadle.ops.cross_entropy import CHUNK_NUMBERS
from treadle.ops.precision import autocast
from treadle.text.base import Tokenizer

LN2 = math.log(2)
INSPECTED_ROWS = 4
SUMS = ("nats", "correct", "top5", "labels", "bytes")
LOWER_IS_BETTER = {"loss": True, "bpb": True, "perplexity": True, "accuracy": False, "top5_accuracy": False}


class Evaluator:
    """Evaluates one model; `precision` is what it was trained in, `strategy` how it is spread over processes."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, precision: str = "fp32", strategy: Strategy | None = None
    ) -> None:
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
        self.strategy = strategy
        self._lengths = torch.from_numpy(np.asarray(tokenizer.byte_lengths, dtype=np.int64))

    def evaluate(
        self,
        data: Dataset,
        batch_size: int = 16,
        rows: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """loss (nats a label), bpb, perplexity, accuracy, top5_accuracy, and the labels and bytes they are over.

        `rows` takes that many rows spread over the data. None when `should_stop` turned true on the way.
        """
        batches = data.in_sequence(batch_size, rows)
        world = self.strategy.world if self.strategy is not None else World()
        sums: list[list[float]] = []
        was_training = self.model.training
        self.model.eval()
        try:
            # Batch b is process b mod W's. One without a batch left takes padding: shards are gathered by all or none.
            for first in range(0, len(batches), world.size):
                if should_stop():
                    return None
                mine = first + world.rank
                source, row = batches[mine] if mine < len(batches) else (batches[0][0], np.full_like(batches[0][1], -1))
                found = self.batch_sums(data.batch(source, row))
                sums.append([found[name] for name in SUMS])
        finally:
            self.model.train(was_training)
        # Added up in the order of the batches, whoever computed them: the same bits for any number of processes.
        parts = world.all_gather_object(sums)
        total = [math.fsum(values) for values in zip(*(part[i] for i in range(len(sums)) for part in parts))]
        return metrics_of(dict(zip(SUMS, total)))

    def batch_sums(self, batch: Batch) -> dict[str, float]:
        """nats, correct, top5, labels and bytes of one batch, added up in fp64."""
        return self._look(self._batch_sums, batch)

    def inspect(self, data: Dataset) -> dict[str, float]:
        """The model's own numbers (`Model.inspect`) on the first rows of `data`, the same for any number of processes."""
        if type(self.model).inspect is Model.inspect:
            return {}
        (source, row), *_ = data.in_sequence(INSPECTED_ROWS, INSPECTED_ROWS)
        return self._look(self._inspect, data.batch(source, row))

    def _look(self, work: Callable[[Model, Batch], dict[str, float]], batch: Batch) -> dict[str, float]:
        return work(self.model, batch) if self.strategy is None else self.strategy.with_full_weights(work, batch)

    @torch.no_grad()
    def _inspect(self, model: Model, batch: Batch) -> dict[str, float]:
        with autocast(self.precision, model.device):
            return model.inspect(batch.to(model.device))

    @torch.no_grad()
    def _batch_sums(self, model: Model, batch: Batch) -> dict[str, float]:
        assert batch.labels is not None
        size = self._lengths[batch.labels[batch.labels != IGNORE]].sum()
        batch = batch.to(model.device)
        with autocast(self.precision, model.device):
            out = model.hidden(batch)
            assert out.hidden is not None and batch.labels is not None
            scored = batch.labels != IGNORE
            hidden, labels = out.hidden[scored], batch.labels[scored]
            nats = correct = top5 = torch.zeros((), dtype=torch.float64, device=hidden.device)
            chunk = max(64, CHUNK_NUMBERS // model.config.vocab_size)
            for start in range(0, len(labels), chunk):
                logits = model.head(hidden[start : start + chunk]).float()
                target = labels[start : start + chunk, None]
                own = logits.gather(1, target)
                nats = nats + (logits.logsumexp(-1) - own[:, 0]).double().sum()
                rank = (logits > own).sum(-1)  # how many symbols score higher
                correct, top5 = correct + (rank < 1).sum(), top5 + (rank < 5).sum()
        return {"nats": float(nats), "correct": float(correct), "top5": float(top5), "labels": float(len(labels)),
                "bytes": float(size)}  # fmt: skip

    def compare_checkpoints(self, paths: list[str], data: Dataset, batch_size: int = 16) -> list[dict[str, Any]]:
        """One row of metrics a checkpoint, its weights loaded into this model; the model's own weights come back."""
        from treadle.checkpoint.reader import Checkpoint

        kept = {name: tensor.detach().clone() for name, tensor in self.model.named_weights().items()}
        table = []
        try:
            for path in paths:
                checkpoint = Checkpoint(path)
                self.model.load_weights(checkpoint.tensors("model"))
                table.append({"checkpoint": path, "step": checkpoint.step, **(self.evaluate(data, batch_size) or {})})
        finally:
            self.model.load_weights(kept)
        return table


def metrics_of(sums: dict[str, float]) -> dict[str, float]:
    """Sums -> metrics. bpb = nats / ln 2 / bytes of the scored symbols."""
    labels, size = max(1.0, sums["labels"]), max(1.0, sums["bytes"])
    loss = sums["nats"] / labels
    return {
        "loss": loss,
        "bpb": sums["nats"] / LN2 / size,
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sums["correct"] / labels,
        "top5_accuracy": sums["top5"] / labels,
        "labels": sums["labels"],
        "bytes": sums["bytes"],
    }
