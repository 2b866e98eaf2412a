"""Equal shapes and equal budgets: what each entry of a suite trains, worked out before anything is trained.

The same bytes: rows of a run are drawn by (data, seed, step) alone, so entries with one tokenizer, row length and batch see the same
rows in the same order (their runs' data fingerprints say so). An entry with another tokenizer sees as many bytes: its steps follow
from the bytes that a token of it stands for in this text; its rows are its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle import trusted_code
from treadle.data.dataset import splits_of
from treadle.errors import ConfigError
from treadle.evaluation.report import objective_of
from treadle.models.base import LM_HEAD, Model
from treadle.models.catalogue import MODELS
from treadle.monitor.settings import FILE_SINKS
from treadle.objectives.base import Objective
from treadle.objectives.task import task_settings
from treadle.ops.quick_start import shapes_only
from treadle.planning.equal_parameters import Sized, equal_parameters
from treadle.recipe import Layer, compose, target_layer
from treadle.suite.settings import EntrySettings, Suite

EVALUATIONS = 4  # over a final run; states saved over any
# What a suite's runs do unless the suite says otherwise: held-out loss, and nothing that only costs time.
QUIET = {"eval.sample_tokens": 0, "log.report_to": FILE_SINKS, "checkpoint.save_total_limit": 1}
SET_LATER = (("train", "max_steps"), ("optim", "learning_rate"))
FORWARD_AND_BACKWARD = 3  # times the forward pass (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)


@dataclass
class Variant:
    """An entry at one size. tables: its whole configuration but for seed, rate, steps and folder. bytes_per_step and flops_per_step
    are of one optimiser step; steps: of a final run, 0 until it is known (a budget of CPU seconds follows a measurement). identity: what of `tables` is not at its
    default, so that keys which treadle learns later leave finished runs where they are, and the contents of code that it names."""

    entry: EntrySettings
    size: int | None
    arch: str
    parameters: int
    tables: dict[str, Any]
    rows: int
    seq_len: int
    bytes_per_step: float
    flops_per_step: float
    fingerprint: str = ""  # of the data with seed 0
    identity: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    search_steps: int = 0
    metric: str = ""  # what is compared, as the objective calls it, and which way it is better
    lower_is_better: bool = True

    @property
    def label(self) -> str:
        return self.entry.label if self.size is None else f"{self.entry.label} {self.size}"

    def set_steps(self, budget_of_step: float, budget: float, search_share: float) -> None:
        self.steps = whole(budget / budget_of_step)
        self.search_steps = whole(search_share * budget / budget_of_step)


def whole(steps: float) -> int:
    """Steps that are evaluated EVALUATIONS times, the last time at the end."""
    return max(EVALUATIONS, EVALUATIONS * round(steps / EVALUATIONS))


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def with_code(tables: dict[str, Any]) -> dict[str, Any]:
    """A configuration and, where it names code of one's own, the digests of those files: edited, it is another configuration."""
    code = trusted_code.contents(tables)
    return {**tables, "code": code} if code else tables


def variants(suite: Suite) -> list[Variant]:
    """Every entry at every size, the sizes of one entry together. ConfigError, naming the entry, for what cannot be."""
    found = []
    for entry in suite.entries:
        for size in suite.sizes:
            try:
                found.append(_variant(suite, entry, size))
                for probe in suite.probes.names if suite.probes is not None else []:  # what cannot be is said before anything runs
                    probe_tables(suite, found[-1], probe)
            except ConfigError as problem:
                raise ConfigError(f"entry {entry.label!r}: {problem}") from None
    _same_labels(found)
    return found


def _same_labels(found: list[Variant]) -> None:
    """With one size the label alone names a row."""
    if len({variant.size for variant in found}) == 1:
        for variant in found:
            variant.size = None


def _variant(suite: Suite, entry: EntrySettings, size: int | None) -> Variant:
    settings = suite.settings
    own = compose([Layer({"model.arch": entry.architecture, **entry.keys}, f"[[entries]] {entry.label}")]).model
    recipe = compose([target_layer(settings.base), Layer(dict(QUIET), "suite"), Layer(dict(settings.keys), "[keys]"),
                      Layer({"model.arch": entry.architecture, **entry.keys}, f"[[entries]] {entry.label}")])  # fmt: skip
    data = splits_of(recipe.data, recipe.tokenizer, task_settings(recipe.tables()), 0)["train"]
    cls: type[Model] = MODELS.get(recipe.arch)
    from_data = {key: value for key, value in data.model_keys().items() if key in cls.Config.model_fields}
    sized = _sized(suite, recipe.arch, {**from_data, **own}, settings.shape, size)
    with shapes_only():
        model = cls(cls.Config.with_preset(None, **sized.keys))
    if LM_HEAD in model.heads():
        _ = model.vocab_size  # refused here where its Config has none, before any job
    rows = recipe.train.global_batch_size or recipe.train.per_device_train_batch_size * (recipe.train.gradient_accumulation_steps or 1)
    tokens = rows * data.seq_len
    bytes_per_token = data.stats().get("bytes_per_token")
    if bytes_per_token is None and suite.budget.unit == "bytes":
        raise ConfigError(f"{settings.base} is no text, so a budget of bytes means nothing; give [budget] flops = ... or cpu_seconds = ...")
    differs = recipe.set_values()
    tables = {section: {key: value for key, value in table.items() if value is not None or key in differs.get(section, {})}
              for section, table in recipe.tables().items() if section != "run"}  # None of a default is nothing that is asked for
    tables["model"] = {"arch": recipe.arch, **{k: v for k, v in model.config.model_dump().items() if v is not None}}
    for section, key in SET_LATER:
        tables.get(section, {}).pop(key, None)
    variant = Variant(entry, size, recipe.arch, sized.parameters, tables, rows, data.seq_len, tokens * float(bytes_per_token or 0.0),
                      FORWARD_AND_BACKWARD * float(model.flops(data.seq_len)) * rows, data.fingerprint())  # fmt: skip
    variant.metric, variant.lower_is_better = _compared(settings.metric, objective_of(recipe.tables()))
    identity = {**differs, "model": {"arch": recipe.arch, **sized.keys}}
    variant.identity = with_code({name: {key: value for key, value in table.items() if (name, key) not in SET_LATER}
                                  for name, table in identity.items() if name != "run"})  # fmt: skip
    step = {"bytes": variant.bytes_per_step, "flops": variant.flops_per_step}.get(suite.budget.unit)
    if step is not None:
        variant.set_steps(step, suite.budget.amount, settings.search_share)
    return variant


def _compared(asked: str, objective: Objective) -> tuple[str, bool]:
    """(the metric, whether less of it is better). ConfigError for one of which the objective does not say that."""
    if asked and asked not in objective.metrics:
        known = ", ".join(name for name, metric in objective.metrics.items() if metric.shown)
        raise ConfigError(f"metric = {asked!r}: the objective does not say which way that is better; of these it does: {known}")
    name = asked or objective.ranking_metric
    return name, objective.metric(name).lower_is_better


def _sized(suite: Suite, arch: str, fixed: dict[str, Any], shape: dict[str, Any], size: int | None) -> Sized:
    cls: type[Model] = MODELS.get(arch)
    preferred = {key: value for key, value in shape.items() if key in cls.Config.model_fields}
    if size is not None:
        return equal_parameters(arch, size, fixed, preferred, suite.settings.tolerance)
    keys = {**preferred, **fixed}
    with shapes_only():
        return Sized(arch, keys, cls(cls.Config.with_preset(None, **keys)).parameter_count())


def probe_tables(suite: Suite, variant: Variant, probe: str) -> tuple[dict[str, Any], int]:
    """(the configuration of a probe's run, its model's parameters): the architecture of a variant, small, on generated rows."""
    asked = suite.probes
    assert asked is not None
    own = compose([Layer({"model.arch": variant.arch, **variant.entry.keys}, "entry")]).model
    cls: type[Model] = MODELS.get(variant.arch)
    free = ("hidden_size", "num_layers", "intermediate_size", "hidden_sizes", "vocab_size", "head_dim")
    fixed = {**{key: value for key, value in own.items() if key not in free}, "vocab_size": asked.symbols + 1}
    shape = {**suite.settings.shape, "num_layers": asked.num_layers}
    sized = equal_parameters(variant.arch, asked.parameters, {k: v for k, v in fixed.items() if k in cls.Config.model_fields},
                             {k: v for k, v in shape.items() if k in cls.Config.model_fields}, suite.settings.tolerance)  # fmt: skip
    length = max(2, asked.length // 2) if probe == "associative_recall" else asked.length
    tables = {
        "data": {"dataset_class": "probe"},
        "task": {"probe": probe, "probe_length": length, "probe_symbols": asked.symbols},
        "model": {"arch": variant.arch, **sized.keys},
        "train": {"per_device_train_batch_size": asked.rows},
        "eval": {"sample_tokens": 0},
        "log": {"report_to": FILE_SINKS},
        "checkpoint": {"save_total_limit": 1},
    }
    return tables, sized.parameters


def write_recipe(path: Path, tables: dict[str, Any]) -> None:
    """A configuration as a recipe file that `treadle train` takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
