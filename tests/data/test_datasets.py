"""What holds for every dataset: batches without an end, rows of a seed, data that ends too early."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import treadle
from treadle.checkpoint.layout import steps_in
from treadle.data.base import BatchPlan, Dataset, create_dataloader
from treadle.data.batch import Batch
from treadle.data.generated import GeneratedDataset
from treadle.errors import ConfigError, DataError


class Counted(GeneratedDataset):
    """Row n is n and what its seed gives."""

    seq_len = 3

    def generate(self, rows: np.ndarray) -> Batch:
        return Batch.for_training([[int(n) % 250, *self.random(n).integers(0, 250, 2).tolist()] for n in rows])


class Ends(Counted):
    """Counted, but for four steps alone."""

    def batches(self, position: Any, plan: BatchPlan) -> Iterator[tuple[list[Batch], Any]]:
        return itertools.takewhile(lambda item: item[1] <= 4, super().batches(position, plan))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_without_an_end_leave_no_step_out(workers: int) -> None:
    found = Counted().batches(5, BatchPlan(global_batch_size=2, steps=None, workers=workers))
    taken = [(made[0].input_ids[:, 0].tolist(), position) for made, position in itertools.islice(found, 3)]
    assert taken == [([10, 11], 6), ([12, 13], 7), ([14, 15], 8)]
    found.close()  # type: ignore[attr-defined]


def test_a_hand_written_loop_sees_the_rows_of_a_run(text_file: Path) -> None:
    data = Dataset.load(str(text_file), "byte", 32)
    run = [made[0].input_ids for made, _ in data.batches(0, BatchPlan(seed=3, global_batch_size=4, steps=6))]
    for start in (0, 2):
        own = itertools.islice(create_dataloader(data, 4, seed=3, start_step=start), 4)
        for mine, theirs in zip(own, run[start : start + 4], strict=True):
            assert torch.equal(mine.input_ids, theirs)


def test_held_out_rows_are_the_same_for_every_seed_of_a_run() -> None:
    """So that runs of several seeds can be compared; training rows differ, and no split is another one's."""
    one, other = (Counted.splits(None, None, seed) for seed in (0, 1))  # type: ignore[arg-type]
    rows = np.arange(4)
    for split in ("validation", "test"):
        assert one[split].fingerprint() == other[split].fingerprint()
        assert torch.equal(one[split].generate(rows).input_ids, other[split].generate(rows).input_ids)  # type: ignore[attr-defined]
    prints = {data.fingerprint() for data in (*one.values(), *other.values())}
    assert len(prints) == 4
    assert not torch.equal(one["train"].generate(rows).input_ids, other["train"].generate(rows).input_ids)  # type: ignore[attr-defined]


def test_data_that_ends_too_early_loses_no_step(tmp_path: Path) -> None:
    model = treadle.build("transformer", vocab_size=250, hidden_size=16, num_layers=1, num_heads=2)
    config = treadle.TrainConfig(output_dir=str(tmp_path), max_steps=6, batch_size=2, report_to=["jsonl"], save_steps=9)
    with pytest.raises(DataError, match=r"the data ended 2 steps before the training.*--max_steps"):
        treadle.Trainer(model, Ends(), config=config).train()  # type: ignore[arg-type]
    assert steps_in(tmp_path / "checkpoints")[0] == 4
    assert json.loads((tmp_path / "summary.json").read_text())["exit_code"] == DataError.exit_code


def test_numbers_with_a_fraction_are_no_labels() -> None:
    for keys in ({"labels": [[0.5, 1.0]]}, {"doc_ids": torch.zeros(1, 2)}):
        with pytest.raises(ConfigError, match="integers; targets of another kind go into extras"):
            Batch.from_ids([[1, 2]], **keys)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ids are integers"):
        Batch.from_ids([0.5, 1.0])
    away = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    made = Batch.from_ids(away, extras={"targets": [0.5, 1.0]})  # all of it is where the ids are
    assert made.position_ids is not None and {made.position_ids.device.type, made.extras["targets"].device.type} == {"meta"}
    assert Batch.from_ids([[1, 2]], extras={"targets": [0.5]}).extras["targets"].dtype == torch.float32
