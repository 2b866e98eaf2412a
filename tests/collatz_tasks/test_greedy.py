"""A long step is exact exactly when greedy decoding writes it."""

from __future__ import annotations

import numpy as np
import torch

from treadle.collatz_tasks.long_step import LongStep, LongSteps
from treadle.collatz_tasks.settings import LongStepKeys
from treadle.models.base import build
from treadle.objectives.base import ModelWithObjective
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings
from treadle.training.step import Stepper


def test_exact_is_what_greedy_decoding_writes() -> None:
    task = LongStepKeys(base=4, largest="2^10")
    data, objective = LongSteps(task), LongStep(task)
    model = build("encoder_decoder", hidden_size=32, num_layers=1, num_heads=2, **data.model_keys())
    stepper = Stepper(ModelWithObjective(model, objective), Optimizers(model, OptimSettings()), seed=0, precision="fp32", max_grad_norm=1.0, loss_weights={})
    for step in range(400):
        stepper.run(step, [data.generate(np.arange(64 * step, 64 * step + 64))], 3e-3)
    model.eval()
    batch = data.generate(np.arange(10**6, 10**6 + 200))
    assert batch.labels is not None
    with torch.no_grad():
        right = (model(batch).logits.argmax(-1) == batch.labels).all(1)  # what came before is given
    written = model.generate(batch.input_ids[:, :1], data.seq_len, temperature=0, extras={"source": batch.extras["source"]})[:, 1:]
    assert 5 < int(right.sum()) < 195  # some of each, or nothing is compared
    assert torch.equal((written == batch.labels).all(1), right)
