"""What a suite file says: `treadle compare --suite SUITE.toml`, or the name of a built-in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from treadle.data.probes import PROBES
from treadle.errors import ConfigError
from treadle.files import shipped
from treadle.models.catalogue import MODELS
from treadle.registry import nearest
from treadle.settings import Settings, load_table, option

UNITS = ("bytes", "flops", "cpu_seconds")
SETS_ITSELF = ("seed", "output_dir", "max_steps", "learning_rate", "lr", "arch", "steps", "num_train_epochs", "epochs")


class BudgetSettings(Settings):
    """What each final run may spend; exactly one of the three."""

    called: ClassVar[str] = "budget"

    bytes: float | None = option(None, gt=0)
    """Bytes of text that each run trains on, whatever its tokens are."""

    flops: float | None = option(None, gt=0)
    """Floating-point operations of each run: three times those of a forward pass."""

    cpu_seconds: float | None = option(None, gt=0)
    """CPU seconds of each run's steps, as they are measured beside the first entry's before anything is trained."""

    @model_validator(mode="after")
    def _one(self) -> BudgetSettings:
        if sum(getattr(self, unit) is not None for unit in UNITS) != 1:
            raise ValueError("[budget] is exactly one of bytes, flops and cpu_seconds, as in bytes = 500_000")
        return self

    @property
    def unit(self) -> str:
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def amount(self) -> float:
        return float(getattr(self, self.unit))


class ProbeSettings(Settings):
    """Recall probes: a small model of each architecture, trained on generated rows (data/probes.py)."""

    called: ClassVar[str] = "probes"

    names: list[str] = option(list(PROBES))
    """copy, associative_recall, induction."""

    parameters: int = option(100_000, ge=1000)
    """Of each probe's model, to the suite's tolerance."""

    steps: int = option(400, ge=1)
    """Optimiser steps."""

    rows: int = option(32, ge=1)
    """Rows of a step."""

    learning_rate: float = option(3e-3, gt=0)
    """The same for all: a probe has no grid of its own."""

    length: int = option(8, ge=2)
    """Symbols to copy, the longest string that is repeated, or twice the pairs to recall."""

    symbols: int = option(16, ge=4)
    """Different symbols; chance is one of so many."""

    num_layers: int = option(2, ge=1)
    """Layers of the probe's model, where the architecture counts them."""

    @field_validator("names")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in PROBES:
                raise ValueError(f"there is no probe {name!r}: {nearest(name, list(PROBES))}")
        return names


class EntrySettings(Settings):
    """One row of the table."""

    called: ClassVar[str] = "entries"

    label: str = option("")
    """Its name in the table; default: the architecture."""

    architecture: str = option("transformer", aliases=("arch",))
    """One of `treadle models`."""

    keys: dict[str, Any] = option({})
    """Keys of this entry alone, as on the command line: the model's (which then stay as they are) and any other section's."""

    learning_rates: list[float] = option([])
    """A grid of its own instead of the suite's."""


class SuiteSettings(Settings):
    """A suite."""

    called: ClassVar[str] = "suite"

    name: str = option("")
    """Its name; default: the file's."""

    base: str = option("bytes")
    """A recipe, by name or file, or a text: data, tokenizer, and whatever `keys` does not say."""

    keys: dict[str, Any] = option({})
    """Keys of every run, as on the command line: seq_len = 256, per_device_train_batch_size = 8."""

    shape: dict[str, Any] = option({})
    """Keys of the model for each architecture that has them (num_layers = 4). The width follows from `parameters`."""

    budget: dict[str, Any] = option({})
    """bytes, flops or cpu_seconds."""

    parameters: int | None = option(None, ge=100)
    """Of every model, to `tolerance`; without it (and without sizes) shapes are what the entries say."""

    sizes: list[int] = option([])
    """Several numbers of parameters instead: curves, and from three on a scaling law."""

    tolerance: float = option(0.02, gt=0, lt=0.5)
    """Share by which the numbers of parameters may differ from what is asked."""

    seeds: int = option(3, ge=1)
    """Runs of each entry, with the seeds 0 to N - 1."""

    learning_rates: list[float] = option([3e-3])
    """The grid that each entry's rate is chosen from."""

    search_share: float = option(0.25, gt=0, le=1)
    """Share of the budget that each rate is tried with."""

    probes: dict[str, Any] | None = option(None)
    """Recall probes; none without this table."""

    measure: bool = option(True)
    """Weigh step time, decoding and state side by side."""

    metric: str = option("")
    """What is compared, and what rates are chosen by: a metric of the objective; default: what it ranks by."""

    workers: int | None = option(None, ge=1)
    """Runs at a time; default: the cores of this machine."""

    entries: list[dict[str, Any]] = option([])
    """[[entries]]: label, architecture, keys, learning_rates."""

    @model_validator(mode="after")
    def _consistent(self) -> SuiteSettings:
        if self.parameters is not None and self.sizes:
            raise ValueError("give parameters or sizes, not both")
        if len(set(self.sizes)) < len(self.sizes) or any(size < 100 for size in self.sizes):
            raise ValueError("sizes are different numbers of parameters, each at least 100")
        return self


class Suite:
    """A suite file, checked: `settings`, `budget`, `probes` and `entries`."""

    def __init__(self, table: dict[str, Any], source: str) -> None:
        self.settings = SuiteSettings(**table)
        if not self.settings.entries:
            raise ConfigError(f'{source} names no architectures; add [[entries]] with architecture = "transformer", and another')
        if not self.settings.budget:
            raise ConfigError(f"{source} has no [budget]; add one, as in [budget] and bytes = 500_000")
        self.name = self.settings.name or Path(source).stem
        self.budget = BudgetSettings(**self.settings.budget)
        self.probes = ProbeSettings(**self.settings.probes) if self.settings.probes is not None else None
        self.entries = [_entry(one) for one in self.settings.entries]
        labels = [entry.label for entry in self.entries]
        if (twice := next((label for label in labels if labels.count(label) > 1), None)) is not None:
            raise ConfigError(f"{source} has two entries {twice!r}; give one another label")
        for where, keys in (("keys", self.settings.keys), *((f"entry {e.label!r}", e.keys) for e in self.entries)):
            for key in keys:
                if key.rpartition(".")[2].replace("-", "_") in SETS_ITSELF:
                    raise ConfigError(f"{source}, {where}: a suite sets {key} itself (seeds, learning_rates, budget, architecture)")
        for entry in self.entries:
            rates = entry.learning_rates or self.settings.learning_rates
            if not rates or any(not 0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
                raise ConfigError(f"{source}: learning_rates of {entry.label} are {rates}; give different numbers above 0")

    def rates(self, entry: EntrySettings) -> list[float]:
        return list(entry.learning_rates or self.settings.learning_rates)

    @property
    def sizes(self) -> list[int | None]:
        """Numbers of parameters to solve for; [None] where shapes are as they stand."""
        return list(self.settings.sizes) or [self.settings.parameters]


def _entry(table: dict[str, Any]) -> EntrySettings:
    table = {("architecture" if key == "arch" else key): value for key, value in table.items()}
    entry = EntrySettings(**table)
    entry.architecture = MODELS.canonical(entry.architecture)
    entry.label = entry.label or entry.architecture
    return entry


def builtin_suites() -> dict[str, Path]:
    """Name -> file of the suites that come along."""
    return shipped("suites")


def read_suite(named: str) -> Suite:
    """A suite by file or by name; ConfigError, saying what to type next, for what is neither or cannot work."""
    path, builtin = Path(named), builtin_suites()
    if not path.is_file():
        if named not in builtin:
            raise ConfigError(f"--suite {named}: there is no such file, and no built-in suite of that name: {nearest(named, list(builtin))}")
        path = builtin[named]
    return Suite(load_table(path), str(path))


Kind = Literal["search", "run", "probe", "measure"]
