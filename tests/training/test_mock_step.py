"""The step that is tried before the first one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import treadle
from treadle.data.batch import Batch
from treadle.data.dataset import TokenDataset as Dataset
from treadle.models.base import build
from treadle.objectives.next_token import NextToken
from treadle.training.trainer import Trainer


def test_the_mock_step_knows_the_counts_that_a_data_set_adds(text_file: Path, tmp_path: Path) -> None:
    class Counted(NextToken):
        def __call__(self, model: Any, batch: Batch) -> Any:
            found = super().__call__(model, batch)
            part = next(iter(found.losses.values()))
            found.losses["again"] = treadle.LossTerm(part.total, "numbers")
            return found

    def counted(self: Dataset, source: Any, row: Any) -> Batch:
        made = plain(self, source, row)
        made.counts["numbers"] = made.input_ids.numel()
        return made

    plain, rows = Dataset.batch, Dataset.load(str(text_file), "byte", 32)
    model = build("transformer", vocab_size=256, hidden_size=16, num_layers=2, num_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "batch", counted)
        made = Trainer(model, rows, None, treadle.TrainConfig(output_dir=str(tmp_path), max_steps=2, batch_size=4), Counted())
        assert made.train()["step"] == 2
