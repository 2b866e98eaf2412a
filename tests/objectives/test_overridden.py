"""A loss that a subclass of the trainer computes."""

from __future__ import annotations

import pytest
import torch

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.objectives.next_token import NextToken
from treadle.objectives.overridden import as_losses


def test_a_mean_that_somebody_computes_counts_by_its_labels() -> None:
    """Trainer.compute_loss may return one number; a micro-batch of padding alone, whose mean is not a number, adds nothing."""
    objective = NextToken()
    padding = Batch.for_training([[1, 2, 3]], doc_ids=[[-1, -1, -1]])
    model = torch.nn.Linear(2, 1)
    loss = torch.nn.functional.mse_loss(model(torch.zeros(0, 2)), torch.zeros(0, 1))
    assert loss.isnan()
    term = as_losses(loss, objective, padding).losses[objective.headline]
    term.total.backward()
    assert float(term.total.detach()) == 0 and not model.weight.grad.any()  # type: ignore[union-attr]
    term = as_losses(torch.tensor(0.5), objective, Batch.for_training([[1, 2, 3], [4, 5, 6]])).losses[objective.headline]
    assert float(term.total) == 2.0 and term.unit == "labels"
    unscored = as_losses(torch.tensor(0.5), objective, Batch.from_ids([[1, 2, 3], [4, 5, 6]])).losses[objective.headline]
    assert float(unscored.total) == 1.0 and unscored.unit == "rows"
    with pytest.raises(ConfigError, match="one number"):
        as_losses(torch.zeros(2), objective, padding)
