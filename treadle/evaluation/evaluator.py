"""How good a model is on text it was not trained on. The one place where evaluation sums become metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from treadle.data.batch import IGNORE, Batch
from treadle.data.dataset import Dataset
from treadle.models.base import Model
from treadle.ops.cross_entropy import CHUNK_NUMBERS
from treadle.ops.precision import autocast
from treadle.text.base import Tokenizer

LN2 = math.log(2)
LOWER_IS_BETTER = {"loss": True, "bpb": True, "perplexity": True, "accuracy": False, "top5_accuracy": False}


class Evaluator:
    """Evaluates one model; `precision` is what it was trained in."""

    def __init__(self, model: Model, tokenizer: Tokenizer, precision: str = "fp32") -> None:
        self.model, self.tokenizer, self.precision = model, tokenizer, precision
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
        sums = {"nats": 0.0, "correct": 0.0, "top5": 0.0, "labels": 0.0, "bytes": 0.0}
        was_training = self.model.training
        self.model.eval()
        try:
            for source, row in data.in_sequence(batch_size, rows):
                if should_stop():
                    return None
                for name, value in self.batch_sums(data.batch(source, row)).items():
                    sums[name] += value
        finally:
            self.model.train(was_training)
        return metrics_of(sums)

    @torch.no_grad()
    def batch_sums(self, batch: Batch) -> dict[str, float]:
        """nats, correct, top5, labels and bytes of one batch, added up in fp64."""
        assert batch.labels is not None
        size = self._lengths[batch.labels[batch.labels != IGNORE]].sum()
        batch = batch.to(self.model.device)
        with autocast(self.precision, self.model.device):
            out = self.model.hidden(batch)
            assert out.hidden is not None and batch.labels is not None
            scored = batch.labels != IGNORE
            hidden, labels = out.hidden[scored], batch.labels[scored]
            nats = correct = top5 = torch.zeros((), dtype=torch.float64, device=hidden.device)
            chunk = max(64, CHUNK_NUMBERS // self.model.config.vocab_size)
            for start in range(0, len(labels), chunk):
                logits = self.model.head(hidden[start : start + chunk]).float()
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
