"""Schedules of the batch and of the rows' length: what a step takes, that nothing is lost, and that a resumed run is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import flags, treadle
from treadle.data.batch import IGNORE, Batch
from treadle.errors import ConfigError
from treadle.training.resolve import table_of
from treadle.training.schedule import sum_before, value_at

TABLE = [(0, 1), (4, 2), (7, 5)]


def test_a_table_by_steps() -> None:
    assert [value_at(TABLE, step) for step in range(9)] == [1, 1, 1, 1, 2, 2, 2, 5, 5]
    assert [sum_before(TABLE, step) for step in range(10)] == [0, 1, 2, 3, 4, 6, 8, 10, 15, 20]


def test_shares_of_a_run_and_lengths_beyond_the_rows() -> None:
    assert table_of([[0, 64], [0.25, 128], [0.75, 512]], 100, 256) == ((0, 64), (25, 128), (75, 256))
    short = table_of([[0, 64], [0.25, 128], [0.75, 512]], 1, 256)
    assert short is not None and [value_at(short, step) for step in range(2)] == [128, 256]
    assert [sum_before(((0, 1), (0, 2), (3, 4)), step) for step in range(5)] == [0, 2, 4, 6, 10]
    assert table_of(None, 10) is None


def test_rows_cut_keep_every_label_and_begin_anew() -> None:
    ids = torch.arange(24).view(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [-1] * 3])
    whole = Batch.for_training(ids, documents)
    whole.counts["bytes"] = 77
    cut = whole.cut(4)
    assert cut.labels is not None and whole.labels is not None
    assert torch.equal(cut.labels.flatten(), whole.labels.flatten()) and cut.shape == (6, 4)
    assert cut.segments == ((4,), (1, 3), (4,), (4,), (4,), (1, -3))
    assert cut.position_ids is not None
    assert cut.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert cut.counts == {**whole.counts, "rows": 6, "documents": 7}
    assert int((cut.labels != IGNORE).sum()) == cut.counts["labels"]


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be cut into rows of 5"):
        Batch.for_training(torch.arange(24).view(2, 12)).cut(5)


def losses(folder: Path) -> list[Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["tokens"]) for row in rows if "learning_rate" in row]


def train(text: Path, folder: Path, **keys: object) -> str:
    done = treadle("train", text, "--output_dir", folder, *flags(**keys))
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_a_schedule_of_one_size_is_accumulation(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "scheduled", max_steps=4, batch_size_schedule="[[0, 2]]")
    train(text_file, tmp_path / "accumulated", max_steps=4, gradient_accumulation_steps=2)
    assert losses(tmp_path / "scheduled") == losses(tmp_path / "accumulated")


def test_resumed_between_two_sizes_and_lengths_it_is_the_same(text_file: Path, tmp_path: Path) -> None:
    keys = {"batch_size_schedule": "[[0, 1], [3, 2], [5, 3]]", "seq_len_schedule": "[[0, 8], [4, 32]]", "warmup_steps": 1,
            "lr_scheduler_type": "constant", "save_steps": 100}  # fmt: skip
    train(text_file, tmp_path / "whole", max_steps=8, **keys)
    train(text_file, tmp_path / "parts", max_steps=4, **keys)
    assert "Resumed from step 4" in train(text_file, tmp_path / "parts", max_steps=8, **keys)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    tokens = [row[2] for row in losses(tmp_path / "whole")]
    assert [b - a for a, b in zip([0, *tokens], tokens)] == [128, 128, 128, 256, 256, 384, 384, 384]


def test_shorter_rows_change_what_attention_sees_and_nothing_else(text_file: Path, tmp_path: Path) -> None:
    train(text_file, tmp_path / "cut", max_steps=2, seq_len_schedule="[[0, 8], [1, 32]]")
    train(text_file, tmp_path / "whole", max_steps=2)
    (a, a_loss, a_tokens), (b, b_loss, b_tokens) = losses(tmp_path / "cut")[0], losses(tmp_path / "whole")[0]
    assert (a, a_tokens) == (b, b_tokens) and a_loss != b_loss


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"seq_len_schedule": "[[0, 5]]", "max_steps": 2}, "they may be 1, 2, 4, 8, 16, 32"),
        ({"seq_len_schedule": "[[3, 8]]", "max_steps": 2}, "growing steps"),
        ({"batch_size_schedule": "[[0, 2]]"}, "give --max_steps"),
        ({"batch_size_schedule": "[[0, 0]]", "max_steps": 2}, "growing steps (or shares of the run) and n >= 1"),
    ],
)
def test_schedules_that_cannot_be(text_file: Path, tmp_path: Path, keys: dict[str, object], says: str) -> None:
    done = treadle("train", text_file, "--output_dir", tmp_path / "run", *flags(**keys))
    assert done.returncode == 2 and says in done.stderr, done.stderr


def test_the_built_in_recipe_leaves_rows_that_are_no_text_whole(tmp_path: Path) -> None:
    line = ("train", "--data.dataset_class", "collatz", "--model.arch", "collatz", "--max_steps", 1, "--output_dir", tmp_path / "run")
    done = treadle(*line)
    assert done.returncode == 0, done.stderr
    asked = treadle(*line, "--fresh", "--seq_len_schedule", "[[0, 4]]")
    assert asked.returncode == 2 and "cuts rows of text" in asked.stderr
