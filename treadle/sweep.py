"""`treadle sweep`: a grid of ordinary runs over keys and seeds, in processes of their own, and one table of what came out."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.distributed.pool import Command, LocalPool, folder_name, last_words, run_all
from treadle.errors import ConfigError, TreadleError
from treadle.monitor.records import last_evaluation, write_json
from treadle.reporting.bars import svg_bars

if TYPE_CHECKING:
    from treadle.start import Request

EXAMPLE = "treadle sweep RECIPE --over optim.learning_rate=1e-3,3e-3 --seeds 3"
BAR = 40  # characters


class SweepFailed(TreadleError):
    """Some runs of a grid did not finish."""


@dataclass
class Cell:
    """One run of the grid."""

    point: tuple[tuple[str, str], ...]  # key and value, as typed
    seed: int
    folder: Path
    value: float | None = None  # at the newest evaluation
    metric: str = ""  # the one that the objective ranks by
    lower_is_better: bool = True
    step: int = 0
    cpu_seconds: float = 0.0  # of training
    failed: str = ""

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.point)


@dataclass
class Sweep:
    """What was asked: `arguments` are those of `train`, the same for every run."""

    arguments: list[str]
    over: dict[str, list[str]]
    seeds: int = 1
    processes: int = 1
    output: Path = Path("runs/sweep")

    def cells(self) -> list[Cell]:
        """Seed by seed, so that an interrupted sweep has every point once before any point twice."""
        points = list(itertools.product(*([(key, value) for value in values] for key, values in self.over.items())))
        return [Cell(point, seed, self.output / _folder(point, seed)) for seed in range(self.seeds) for point in points]


def grid(over: list[str]) -> dict[str, list[str]]:
    """['optim.learning_rate=1e-3,3e-3'] -> {'optim.learning_rate': ['1e-3', '3e-3']}; ConfigError where it is no grid."""
    found: dict[str, list[str]] = {}
    for one in over:
        key, equals, values = one.partition("=")
        key = key.strip().lstrip("-")
        several = _split(values)
        if not equals or not key or "" in several:
            raise ConfigError(f"--over {one!r} is not KEY=VALUE,VALUE,...; for example {EXAMPLE}")
        if key in found:
            raise ConfigError(f"--over names {key} twice; put its values together: --over {key}={','.join(found[key] + several)}")
        if key in ("seed", "run.seed", "output_dir", "run.output_dir"):
            raise ConfigError(f"--over {key}: sweep sets it itself; --seeds N repeats every point with the seeds 0 to N - 1")
        if len({folder_name(value) for value in several}) < len(several):
            raise ConfigError(f"--over {one!r} has a value twice; keep one")
        found[key] = several
    if not found:
        raise ConfigError(f"sweep needs a grid: {EXAMPLE}")
    return found


def _split(values: str) -> list[str]:
    """At the commas outside of all brackets, braces and quotes: a list, a table or a text is one value."""
    several, depth, quote = [""], 0, ""
    for place, sign in enumerate(values):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'" and several[-1].rstrip()[-1:] in "[{,=:" and sign in values[place + 1 :]:  # not that of `don't`
            quote = sign
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth = max(0, depth - 1)
        if sign == "," and not (depth or quote):
            several.append("")
        else:
            several[-1] += sign
    return [value.strip() for value in several]


def run(asked: Sweep, say: Callable[[str], None], request_of: Callable[[list[str]], Request]) -> list[Cell]:
    """Runs what has not finished and returns all cells. A run that exists continues; one that is finished says so at once.
    request_of: what `train` understands of its arguments. ConfigError before the first run where a cell's settings are refused,
    and from the first run that refuses what only the data and the model show."""
    cells = asked.cells()
    _compose_all(asked, cells, request_of)
    asked.output.mkdir(parents=True, exist_ok=True)
    say(f"{len(cells)} run(s) in {asked.output}, {asked.processes} at a time; Ctrl-C is safe, the same command goes on")
    waiting = iter(cells)

    def take() -> Command[Cell] | None:
        return next((_command(asked, cell) for cell in waiting), None)

    def ended(cell: Cell, code: int) -> None:
        _ended(code, cell, say)
        write_json(asked.output / "sweep.json", {"cells": [_record(cell) for cell in cells]})

    run_all(LocalPool(asked.processes), take, ended)
    if (picture := picture_of(cells)) is not None:
        (asked.output / "sweep.svg").write_text(picture, encoding="utf-8")
    return cells


def _compose_all(asked: Sweep, cells: list[Cell], request_of: Callable[[list[str]], Request]) -> None:
    """Composes the recipe of every cell, without reading data. ConfigError, as its run would give it, for the first refused."""
    from treadle.start import configure

    found: dict[str | None, Request] = {}  # by --from, whose weights are verified once
    for cell in cells:
        try:
            request = request_of(_arguments(asked, cell))
            if (same := found.setdefault(request.weights_from, request)) is not request:
                request.start_weights = same.start_weights
            configure(request, cell.folder)
        except ConfigError as problem:
            raise ConfigError(f"{cell.label}: {problem}") from None
        except (TreadleError, OSError):  # of this run and its files alone: the table says it
            continue


def _arguments(asked: Sweep, cell: Cell) -> list[str]:
    """Of the cell's `train`."""
    own = (*cell.point, ("seed", str(cell.seed)), ("output_dir", str(cell.folder)))
    return [*asked.arguments, *(f"--{key}={value}" for key, value in own)]


def _command(asked: Sweep, cell: Cell) -> Command[Cell]:
    return Command(cell, ("treadle", "train", *_arguments(asked, cell)), cell.folder / "sweep.out")


def _ended(code: int, cell: Cell, say: Callable[[str], None]) -> None:
    if code:
        cell.failed = last_words(cell.folder / "sweep.out", code)
        if code == ConfigError.exit_code:  # the others would be refused as this one was
            raise ConfigError(f"{cell.label}: {cell.failed.removeprefix('error: ')}")
        say(f"{cell.label} seed {cell.seed}: {cell.failed} ({cell.folder / 'sweep.out'})")
        return
    summary = json.loads((cell.folder / "summary.json").read_text(encoding="utf-8"))
    cell.cpu_seconds, cell.metric = summary["cpu_seconds"], summary["ranking_metric"]
    cell.lower_is_better = summary["lower_is_better"]
    newest = last_evaluation(cell.folder / "eval_log.csv")
    if cell.metric in newest:
        cell.value, cell.step = newest[cell.metric], int(newest["step"])
    shown = "no evaluation" if cell.value is None else f"{cell.metric} {cell.value:.4f} at step {cell.step}"
    say(f"{cell.label} seed {cell.seed}: {shown}")


@dataclass
class Point:
    """The runs of one combination of values."""

    label: str
    cells: list[Cell]

    @property
    def values(self) -> list[float]:
        return [cell.value for cell in self.cells if cell.value is not None and math.isfinite(cell.value)]

    @property
    def cpu_seconds(self) -> float:
        return statistics.mean(cell.cpu_seconds for cell in self.cells if cell.value is not None)


def ranked(cells: list[Cell]) -> list[Point]:
    """The points of the grid, the best mean first, those without an evaluation last."""
    points: dict[str, Point] = {}
    for cell in cells:
        points.setdefault(cell.label, Point(cell.label, [])).cells.append(cell)
    sign = 1 if all(cell.lower_is_better for cell in cells) else -1
    return sorted(points.values(), key=lambda point: sign * statistics.mean(point.values) if point.values else math.inf)


def lines_of(cells: list[Cell]) -> list[str]:
    """The table, best mean first: mean, largest - smallest over the seeds, CPU seconds of training, and a bar from the best
    (empty) to the worst."""
    points = ranked(cells)
    means = [statistics.mean(point.values) for point in points if point.values]
    metric = next((cell.metric for cell in cells if cell.metric), "loss")
    width = max(len(point.label) for point in points)
    lines = [f"{'':<{width}}  {metric:>8}  {'spread':>7}  {'CPU s':>7}  seeds"]
    for point in points:
        values, missing = point.values, len(point.cells) - len(point.values)
        if not values:
            lines.append(f"{point.label:<{width}}  {'-':>8}  {'-':>7}  {'-':>7}  0 of {missing}")
            continue
        mean = statistics.mean(values)
        bar = "#" * round(BAR * abs(mean - means[0]) / abs(means[-1] - means[0])) if means[-1] != means[0] else ""
        count = f"{len(values)}" + (f" of {len(point.cells)}" if missing else "")
        lines.append(f"{point.label:<{width}}  {mean:>8.4f}  {max(values) - min(values):>7.4f}  {point.cpu_seconds:>7.1f}  "
                     f"{count:<5}  {bar}".rstrip())  # fmt: skip
    return lines


def picture_of(cells: list[Cell]) -> str | None:
    """The same as SVG; None where nothing was evaluated."""
    rows = [(p.label, statistics.mean(p.values), min(p.values), max(p.values)) for p in ranked(cells) if p.values]
    return svg_bars(next(cell.metric for cell in cells if cell.metric), rows) if rows else None


def unfinished(cells: list[Cell]) -> SweepFailed | None:
    """What to raise, after the table, where runs failed."""
    failed = [cell for cell in cells if cell.failed]
    if not failed:
        return None
    return SweepFailed(f"{len(failed)} of {len(cells)} run(s) failed; the same command tries them again and repeats no other")


def _record(cell: Cell) -> dict[str, Any]:
    return {"point": dict(cell.point), "seed": cell.seed, "folder": str(cell.folder), "metric": cell.metric,
            "lower_is_better": cell.lower_is_better if cell.metric else None, "value": cell.value, "step": cell.step,
            "cpu_seconds": cell.cpu_seconds, "failed": cell.failed}  # fmt: skip


def _folder(point: tuple[tuple[str, str], ...], seed: int) -> str:
    return "__".join([*(f"{folder_name(key)}={folder_name(value)}" for key, value in point), f"seed={seed}"])
