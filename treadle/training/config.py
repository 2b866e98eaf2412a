"""Changes nothing but itself: the configuration of one run: every section, and the model's own keys beside them.

recipe.py composes it from files and flags; whatever trains takes it from here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle import trusted_code
from treadle.checkpoint.settings import CheckpointSettings
from treadle.data.settings import DataSettings
from treadle.distributed.settings import ParallelSettings
from treadle.errors import ConfigError
from treadle.evaluation.settings import EvalSettings
from treadle.models.catalogue import MODELS
from treadle.models.settings import AdapterSettings
from treadle.monitor.settings import AlertSettings, LogSettings
from treadle.objectives.settings import DistillSettings
from treadle.recommended import fitting
from treadle.registry import nearest
from treadle.settings import Settings, dump_toml, fit_value, option
from treadle.text.settings import TokenizerSettings
from treadle.training.settings import OptimSettings, TrainSettings

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
DEFAULT_ARCHITECTURE = "transformer"


class RunSettings(Settings):
    """Which run, where, on what."""

    output_dir: str | None = option(None)
    """The run folder itself; default runs/<run_name>."""

    run_name: str | None = option(None, aliases=("experiment_name",))
    """The run's name; default the recipe's or file's name without its suffix."""

    seed: int = option(0, change="guarded", ge=0, lt=2**63)
    """Everything random is a function of this number and the step."""

    device: str = option("auto", spellings={"gpu": "cuda"})
    """auto (a GPU where there is one), cpu, cuda, or cuda:N. Of several processes each takes the GPU of its number."""

    devices: int | None = option(None, aliases=("num_devices", "nproc_per_node"), ge=1)
    """Processes that `treadle train` starts on this machine, one a GPU or a share of the cores; torchrun does it as well."""

    trusted_code: dict[str, str] | None = option(None)
    """Written by treadle: the files of code that the run has used (path -> sha256). It allows nothing; --trust-code does."""


SECTIONS: dict[str, type[Settings]] = {
    "run": RunSettings,
    "tokenizer": TokenizerSettings,
    "data": DataSettings,
    "train": TrainSettings,
    "optim": OptimSettings,
    "distill": DistillSettings,
    "adapter": AdapterSettings,
    "parallel": ParallelSettings,
    "checkpoint": CheckpointSettings,
    "eval": EvalSettings,
    "log": LogSettings,
    "alerts": AlertSettings,
}


# Keys that mean something from one step to the next.
SETTABLE = (
    "optim.learning_rate", "optim.min_lr_ratio", "log.logging_steps", "eval.eval_steps", "checkpoint.save_steps",
    "alerts.alert_steps", "train.on_spike",
)  # fmt: skip


@dataclass
class Recipe:
    """A composed configuration. `model` holds the architecture's own keys as given, `task` those of
    a dataset and an objective of one's own, `origins` where each value came from."""

    run: RunSettings = field(default_factory=RunSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    log: LogSettings = field(default_factory=LogSettings)
    alerts: AlertSettings = field(default_factory=AlertSettings)
    arch: str = DEFAULT_ARCHITECTURE
    preset: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name; "run" where none is given."""
        return "run" if self.run.run_name is None else self.run.run_name

    @property
    def folder(self) -> Path:
        """The run folder; a name that would leave `runs/` is refused."""
        if self.run.output_dir is not None:
            return Path(self.run.output_dir)
        check_run_name(self.name)
        return Path("runs") / self.name

    @property
    def log_folder(self) -> Path:
        """Where metrics go: log.log_dir, else the run's folder."""
        return Path(self.log.log_dir) if self.log.log_dir else self.folder

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints go: checkpoint.checkpoint_dir, else checkpoints/ in the run's folder."""
        return Path(self.checkpoint.checkpoint_dir) if self.checkpoint.checkpoint_dir else self.folder / "checkpoints"

    def section(self, name: str) -> Settings:
        """The settings of [name]."""
        return getattr(self, name)

    def tables(self) -> dict[str, dict[str, Any]]:
        """All sections as plain tables, the model's choice and keys included."""
        tables = {name: self.section(name).model_dump() for name in SECTIONS}
        model = {"arch": self.arch, "preset": self.preset, **self.model}
        task = {"task": self.task} if self.task else {}
        return {"run": tables.pop("run"), "model": model, **task, **tables}

    def set_values(self) -> dict[str, dict[str, Any]]:
        """The same without what is at its default (or the preset's recommended value), as a recipe would say it."""
        usual = {name: {k: i.get_default(call_default_factory=True) for k, i in cls.model_fields.items()}
                 for name, cls in SECTIONS.items()}  # fmt: skip
        usual |= {"model": {"preset": None}, "task": {}}
        tables = self.tables()
        recommended = MODELS.get(self.arch).Config.recommended(self.preset) if self.preset is not None else {}
        kept = fitting(recommended, {f"{name}.{k}": v for name, table in tables.items() for k, v in table.items()})
        for dotted, value in recommended.items():
            section, _, key = dotted.partition(".")
            if dotted in kept:
                usual[section][key] = value
            else:
                del usual[section][key]  # said even where it is the section's default
        return {name: {k: v for k, v in table.items() if k not in usual[name] or v != usual[name][k]} for name, table in tables.items()}

    def to_toml(self) -> str:
        """All of it as config.toml, with the code that it trusts."""
        tables = self.tables()
        tables["run"]["trusted_code"] = {**(self.run.trusted_code or {}), **trusted_code.record(tables)} or None
        return dump_toml(tables)

    def fit_while_training(self, word: str, value: Any) -> tuple[str, Any]:
        """The full name of a key that may change between two steps, and `value` (text or not) as it wants it.
        ConfigError for any other key."""
        found = [key for key in SETTABLE if word in (key, key.partition(".")[2])]
        if not found:
            raise ConfigError(f"{word!r} cannot be set while training: {nearest(word, list(SETTABLE))}")
        section, _, name = found[0].partition(".")
        return found[0], fit_value(SECTIONS[section], name, value, from_text=isinstance(value, str))

    def change_rule(self, dotted: str) -> str:
        """How a key may change when a run continues: free, guarded or fixed."""
        section, _, key = dotted.partition(".")
        if section == "model":
            return "fixed"
        if section == "task":
            from treadle.objectives.task import task_class

            task = task_class(self.data.dataset_class, self.train.objective)
            return (task.key_info(key)["change"] if task is not None else None) or "fixed"
        return SECTIONS[section].key_info(key)["change"] or "free"


def check_run_name(name: str) -> None:
    """Run names become folder names, so they hold no separators and no surprises. ConfigError for others."""
    if not RUN_NAME.fullmatch(name):
        raise ConfigError(
            f"run.run_name = {name!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit, "
            "at most 128; --output_dir takes any path"
        )
