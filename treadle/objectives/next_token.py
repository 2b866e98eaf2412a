"""Predict the next symbol: the sum of nats over labels, plus whatever losses the model itself brings."""

from __future__ import annotations

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.models.base import Model
from treadle.objectives.base import CountUnit, Losses, LossTerm, Objective
from treadle.ops.cross_entropy import linear_cross_entropy


class NextToken(Objective):
    """Cross-entropy of the next symbol, with the head inside so that all logits never exist at once."""

    main = "next_token"

    def __call__(self, model: Model, batch: Batch) -> Losses:
        if batch.labels is None:
            raise ConfigError("the batch has no labels; make it with Batch.for_training(ids)")
        out = model.hidden(batch)
        assert out.hidden is not None
        losses = {self.main: LossTerm(linear_cross_entropy(*model.linear_head(out.hidden), batch.labels), "labels")}
        for name, (total, unit) in out.losses.items():
            losses[name] = LossTerm(total, _unit(unit))
        return Losses(losses, out.stats)


def _unit(name: str) -> CountUnit:
    if name not in ("labels", "tokens", "rows", "documents"):
        raise ConfigError(f"a model's loss counts {name!r}; it must be labels, tokens, rows or documents")
    return name  # type: ignore[return-value]
