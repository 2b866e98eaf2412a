"""What training and evaluation read: the contract of every dataset, and the base of those whose steps have numbers.

A dataset is a file of prepared tokens, a stream, or a function that makes rows; nothing else in treadle knows which. It
hands out batches and, with each, the position from which the next one would be read. A position is a small JSON value (a
step number, or the cursors of a stream): the only thing that a run remembers of its data.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from treadle.data.settings import TEXT
from treadle.registry import Registry
from treadle.settings import Settings

if TYPE_CHECKING:
    from treadle.data.batch import Batch
    from treadle.data.settings import DataSettings
    from treadle.text.base import Tokenizer
    from treadle.text.settings import TokenizerSettings

Position = Any  # JSON: numbers, strings, lists and tables

DATASETS = Registry("dataset", {
    TEXT: "treadle.data.dataset:TokenDataset",
    "conversations": "treadle.data.conversations:Conversations",
    "preferences": "treadle.data.preferences:Preferences",
    "probe": "treadle.data.probes:Probes",
    "collatz": "treadle.collatz_tasks.parity:Parities",
    "collatz_delay": "treadle.collatz_tasks.parity:Digits",
    "collatz_long_step": "treadle.collatz_tasks.long_step:LongSteps",
}, base="treadle.data.base:Dataset")  # fmt: skip

# What an objective learns from where data.dataset_class names nothing.
DATASET_OF_OBJECTIVE = {"sft": "conversations", "dpo": "preferences"}


@dataclass(frozen=True)
class BatchPlan:
    """How one of `world_size` processes shares in the global batches of a run.

    Row j of a step (of global_batch_size rows) belongs to rank floor(j world_size / global_batch_size), and there to
    `accumulation` micro-batches in order. steps: how many will be read from here on (None: no end is known). rows: how
    many of the rows from here on are wanted; those behind them (after the last epoch) are padding. workers: processes
    that may build batches ahead, with `prefetch` steps each.
    """

    seed: int = 0
    global_batch_size: int = 1
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    steps: int | None = None
    rows: int | None = None
    workers: int = 0
    prefetch: int = 4

    def alone(self) -> BatchPlan:
        """The same without worker processes."""
        return replace(self, workers=0)


class BatchSequence(Sequence["Batch"]):
    """Batches that are made when they are asked for."""

    def __init__(self, make: Callable[[Any], Batch], keys: Sequence[Any]) -> None:
        self._make, self._keys = make, keys

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return BatchSequence(self._make, self._keys[index])
        return self._make(self._keys[index])


class Dataset(ABC):
    """Base of every dataset.

    seq_len: positions in a row, for which floating-point operations are counted. tokenizer: only of datasets that hold
    text. Config: the keys of the [task] section that this dataset understands, or None.
    """

    Config: ClassVar[type[Settings] | None] = None
    name: ClassVar[str | None] = None  # in data.dataset_class, where other keys of [data] choose among several classes of a name
    reads_files: ClassVar[bool] = False  # what data.path names, so that a run can be evaluated on another file
    seq_len: int
    tokenizer: Tokenizer | None = None

    @classmethod
    def splits_with(
        cls, data: DataSettings, task: Any, seed: int, tokenizer_settings: TokenizerSettings, tokenizer: Tokenizer | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Dataset]:  # fmt: skip
        """`splits` for datasets of text. tokenizer: what the run has begun with, None where tokenizer_settings chooses one."""
        return cls.splits(data, task, seed)

    @classmethod
    def splits(cls, data: DataSettings, task: Any, seed: int) -> dict[str, Dataset]:
        """The dataset that a run of this configuration trains on ("train") and those it is evaluated on ("validation",
        "test"). task: the [task] section (an instance of Config and of the objective's Config)."""
        raise NotImplementedError(f"{cls.__name__} has no splits(data, task, seed), so a command line cannot make it")

    @staticmethod
    def load(path: Any, tokenizer: Any = "auto", seq_len: int = 256, split: str = "train", **options: Any) -> Dataset:
        """The rows of text: a file, a folder or a list of them, prepared (and cached) on first use. `options` are keys of
        [data]."""
        return DATASETS.get(TEXT).load(path, tokenizer, seq_len, split, **options)

    @abstractmethod
    def fingerprint(self) -> str:
        """Equal for equal rows, wherever they come from; a run refuses to go on with another one."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """What there is, as plain numbers."""

    def describe(self) -> str:
        """The same in a line for people."""
        return ", ".join(f"{name} {value}" for name, value in self.stats().items())

    def model_keys(self) -> dict[str, Any]:
        """Keys of a model that follow from the data where nobody sets them, for models that have them."""
        return {} if self.tokenizer is None else {"vocab_size": self.tokenizer.vocab_size}

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows of one pass over the data; None where there is no end."""
        return None

    @property
    def start(self) -> Position:
        """The position of the first step of a run."""
        return 0

    @abstractmethod
    def batches(self, position: Position, plan: BatchPlan) -> Iterator[tuple[list[Batch], Position]]:
        """From `position` on: the micro-batches of each step of plan.rank, and the position after that step."""

    @abstractmethod
    def in_sequence(self, batch_size: int, limit: int | None = None) -> Sequence[Batch]:
        """All rows once, in the same order each time; `limit` rows spread evenly when there are more."""

    def rows_of(self, position: Position, plan: BatchPlan) -> list[Any]:
        """Names (JSON) of the rows in the step at `position`, for the report of a step that went wrong."""
        return []

    def join(self, positions: Sequence[Position]) -> Position:
        """One position from those of all processes after the same step. Where each process knows only its own share of the
        data, all shares."""
        return positions[0]

    def difference(self, fingerprint: str) -> str:
        """What differs from the data with another fingerprint, in words, where that is known."""
        return ""

    def without_fingerprint(self) -> list[str]:
        """Functions of the user's that shape the rows and of which nobody can tell whether they are what they were."""
        return []

    def news(self, position: Position, plan: BatchPlan) -> list[str]:
        """What reading up to a position has come upon since this was last asked, a line each: lines left out, a source's epochs."""
        return []


class IndexedDataset(Dataset):
    """A dataset whose every step is a pure function of (seed, step number); a position is that number."""

    @abstractmethod
    def step_reader(self, position: int, plan: BatchPlan) -> Callable[[int], list[Batch]]:
        """A function of the step number that gives plan.rank's micro-batches, for steps from `position` on."""

    def batches(self, position: Position, plan: BatchPlan) -> Iterator[tuple[list[Batch], Position]]:
        read = self.step_reader(position, plan)

        def numbers() -> Iterator[int]:  # one for whoever reads and one for the positions: a shared count would skip steps
            return itertools.count(position) if plan.steps is None else iter(range(position, position + plan.steps))

        if plan.workers:
            from treadle.data.workers import in_workers

            made: Iterator[list[Batch]] = in_workers(read, numbers(), plan.workers, plan.prefetch)
        else:
            made = map(read, numbers())
        for number, micro_batches in zip(numbers(), made):
            yield micro_batches, number + 1


def create_dataloader(dataset: Dataset, batch_size: int, seed: int = 0, start_step: int = 0) -> Iterator[Batch]:
    """An endless iterator of batches in training order, for a hand-written loop."""
    position = start_step if start_step else dataset.start
    for micro_batches, _ in dataset.batches(position, BatchPlan(seed, batch_size)):
        yield micro_batches[0]
