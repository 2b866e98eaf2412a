"""Data that is computed rather than read: row i is a pure function of (seed, i)."""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from treadle.data.base import BatchPlan, BatchSequence, Dataset, IndexedDataset, Position
from treadle.data.order import key, step_draws

if TYPE_CHECKING:
    from treadle.data.batch import Batch
    from treadle.data.settings import DataSettings

SPLITS = ("train", "validation", "test")


class GeneratedDataset(IndexedDataset):
    """Base of datasets without an end whose rows are made when they are wanted. A subclass writes `generate`.

    Row n of a run is row n of its seed, so any number of processes, any worker and any restart see the same rows, and
    none is seen twice. The validation and test rows come from seeds of their own, which the run's seed does not change, so
    that runs of several seeds can be compared. version: raise it when the rows change though the source of the class does
    not (both are part of the fingerprint).
    """

    seq_len = 1
    evaluation_rows = 1024
    version = 1

    def __init__(self, task: Any = None, seed: int = 0, split: str = "train", seq_len: int | None = None) -> None:
        self.task = task if task is not None else (self.Config() if self.Config is not None else None)
        self.split = split
        self.seed = seed if split == "train" else key(SPLITS.index(split)) >> 1
        if seq_len is not None:
            self.seq_len = seq_len

    @classmethod
    def splits(cls, data: DataSettings, task: Any, seed: int) -> dict[str, Dataset]:
        return {split: cls(task, seed, split) for split in SPLITS}

    @abstractmethod
    def generate(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers, int64 [B], as a Batch. Whatever is random in row n comes from self.random(n)."""

    def random(self, row: int) -> np.random.Generator:
        """The random numbers of one row (Philox, keyed by seed and row number)."""
        return np.random.Generator(np.random.Philox(key=[self.seed, int(row)]))

    def step_reader(self, position: int, plan: BatchPlan) -> Callable[[int], list[Batch]]:
        def read(step: int) -> list[Batch]:
            rows = step_draws(step, plan.global_batch_size, plan.rank, plan.world_size)
            return [self.generate(part) for part in np.split(rows, plan.accumulation)]

        return read

    def in_sequence(self, batch_size: int, limit: int | None = None) -> Sequence[Batch]:
        count = self.evaluation_rows if limit is None else min(limit, self.evaluation_rows)
        rows = np.arange(count, dtype=np.int64)
        return BatchSequence(self.generate, [rows[i : i + batch_size] for i in range(0, count, batch_size)])

    def rows_of(self, position: Position, plan: BatchPlan) -> list[Any]:
        return step_draws(position, plan.global_batch_size, plan.rank, plan.world_size).tolist()

    def fingerprint(self) -> str:
        try:
            source = inspect.getsource(type(self))
        except (OSError, TypeError):
            source = ""  # typed into an interpreter: `version` alone tells one generator from another
        keys = self.task.model_dump() if self.task is not None else None
        described = [type(self).__name__, self.version, source, keys, self.seed, self.seq_len]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def stats(self) -> dict[str, Any]:
        return {"rows": "without end", "row_length": self.seq_len, "evaluation_rows": self.evaluation_rows}

    def describe(self) -> str:
        if self.split == "train":
            return f"{type(self).__name__}, rows of {self.seq_len} made as they are wanted"
        return f"{self.evaluation_rows:,} rows of {self.seq_len} from a seed of its own"
