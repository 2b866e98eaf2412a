"""The [task] section: the keys that a dataset and an objective of one's own bring along."""

from __future__ import annotations

from typing import Any

from treadle.data.base import DATASETS
from treadle.data.settings import TEXT
from treadle.objectives.base import OBJECTIVES
from treadle.objectives.settings import DEFAULT_OBJECTIVE
from treadle.settings import Settings


def task_class(dataset: str, objective: str) -> type[Settings] | None:
    """The section's class: the dataset's Config and the objective's as one; None when neither has keys."""
    wanted = [DATASETS.get(dataset).Config if dataset != TEXT else None,
              OBJECTIVES.get(objective).Config if objective != DEFAULT_OBJECTIVE else None]  # fmt: skip
    bases: list[type[Settings]] = []
    for config in wanted:
        if config is not None and not any(issubclass(base, config) for base in bases):
            bases = [base for base in bases if not issubclass(config, base)] + [config]
    if not bases:
        return None
    return bases[0] if len(bases) == 1 else type("TaskSettings", tuple(bases), {"__doc__": bases[0].__doc__})


def task_settings(config: dict[str, Any]) -> Settings | None:
    """The section of a stored configuration (a config.toml's tables)."""
    cls = task_class(config.get("data", {}).get("dataset_class", TEXT), config.get("train", {}).get("objective", DEFAULT_OBJECTIVE))
    return None if cls is None else cls(**config.get("task", {}))
