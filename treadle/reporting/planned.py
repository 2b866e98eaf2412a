"""What `treadle plan` says about a run's configuration, beside what the run itself measured."""

from __future__ import annotations

from typing import Any

from treadle.errors import TreadleError
from treadle.ops.peak import PEAK_BF16
from treadle.planning.plan import plan
from treadle.reporting.run_data import measured
from treadle.settings import Settings
from treadle.training.config import SECTIONS, Recipe


def recipe_of(tables: dict[str, Any]) -> Recipe:
    """The recipe of a run's own config.toml, which names every value. TreadleError, ValueError or TypeError for one of another version."""
    sections: dict[str, Settings] = {name: cls(**tables.get(name, {})) for name, cls in SECTIONS.items()}
    model = dict(tables.get("model", {}))
    arch, preset = model.pop("arch", "transformer"), model.pop("preset", None)
    return Recipe(arch=arch, preset=preset, model=model, task=dict(tables.get("task", {})), **sections)  # type: ignore[arg-type]


def planned(recipe: Recipe, run: dict[str, Any], flops: float | None = None) -> dict[str, Any]:
    """{"rows": [{"label", "cells": {"planned", "was", "ratio"}}], "note"}. recipe: the run's own; run: what read_run says. flops: operations
    a second of this machine's CPU where they are known already. Without a plan "rows" is empty and "note" says why."""
    environment, summary = run["environment"] or {}, run["summary"] or {}
    gpus = environment.get("gpus") or []
    gpu = next((name for name in PEAK_BF16 if gpus and name in gpus[0]), None) if recipe.run.device != "cpu" else None
    try:
        on = {"gpu": gpu} if gpu is not None else {"flops": flops} if flops is not None else {}
        said = plan(recipe, summary.get("processes") or None, **on)
    except (TreadleError, ValueError, TypeError) as problem:
        return no_plan(problem)
    was = measured(run)
    rows = [
        _row("parameters", said["parameters"], summary.get("parameters"), None),
        _row("peak memory of a process, GB", said["memory"]["total_gb"], was["memory_gb"], None),
        _row("seconds a step", _seconds_of_step(said), was["step_seconds"], None),
        _row("tokens a second", said["time"]["tokens_per_second"], was["tokens_per_second"], None),
    ]
    if was["seconds"] is not None and summary.get("step"):
        rows.append(_row("time of all steps", _seconds_of_step(said) * summary["step"], was["seconds"], "seconds"))
    source = (f"{said['assumptions']['utilisation']:.0%} of the data sheet of an {gpu}" if gpu is not None
              else "a product of matrices on the machine that made this report")  # fmt: skip
    speed = f"{said['assumptions']['flops_per_second'] / 1e12:.3g} TFLOP/s"
    return {"rows": rows, "flops": None if gpu is not None else said["assumptions"]["flops_per_second"],
            "note": f"Planned with {speed} ({source}). Times hold for a machine that does nothing else."}  # fmt: skip


def no_plan(problem: Exception) -> dict[str, Any]:
    """What stands in place of a plan."""
    return {"rows": [], "note": f"No plan could be made of this run's configuration: {problem}"}


def _seconds_of_step(said: dict[str, Any]) -> float:
    return float(said["time"]["step_seconds"])


def _row(label: str, planned: Any, was: Any, kind: str | None) -> dict[str, Any]:
    ratio = was / planned if isinstance(was, (int, float)) and planned else None
    return {"label": label, "cells": {"planned": planned, "was": was, "ratio": ratio}, "kind": kind}
