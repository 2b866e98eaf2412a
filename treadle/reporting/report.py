"""`treadle report`: one HTML file that shows runs, a sweep or a suite, and needs no network."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle import terminal
from treadle.errors import InputError, TreadleError
from treadle.files import write_atomically
from treadle.monitor.records import versions
from treadle.reporting.pages import page
from treadle.reporting.run_data import flat, is_run, measured, read_run, run_in, tables_of
from treadle.reporting.tables import (
    alike,
    architecture,
    best_of,
    differences,
    heading,
    point_of,
    runs_board,
    shown,
    suite_board,
    sweep_board,
)
from treadle.reporting.thinning import rounded, spread, thinned

PARTS = ("charts.js", "panels.js", "report.js")
POINTS = 24_000  # of all runs' curves together: about 1 MB
MOST_RUNS = 21  # colours times kinds of dashes that people tell apart
COMPARED_ROWS = 64  # held-out rows on which runs are measured beside each other
LONGEST_SAMPLE = 3000  # characters
MOST_EVENTS = 400
GREY = 5  # its place in the palette of page.css


def write_report(names: Sequence[str], output: Path | None, model: bool = True) -> list[str]:
    """Writes the file and returns what to say. names: runs (RUN@best and RUN@STEP choose the checkpoint that colours the text), sweeps
    or suites. model: whether checkpoints may be loaded. InputError for what is none of these."""
    places, boards = found_in(names)
    first = places[0].folder if places else Path(names[0])
    target = output if output is not None else (Path(names[0]) if Path(names[0]).is_dir() else first) / "report.html"
    if target.is_dir():
        target = target / "report.html"
    data = collected(places, boards, model)
    title = data.pop("title")
    text = page(title, data, PARTS)
    write_atomically(target, text)
    silent = [f"{run['label']}: {run['text_note']}" for run in data["runs"] if run["text_note"]]
    return [*silent, f"{target} written ({len(text.encode()) / 1e3:,.0f} kB); open it in any browser, it needs no network"]


@dataclass
class Place:
    """A run to read. model: what load_run takes (RUN@best, RUN@STEP); label: what a sweep or suite calls it; named: whether it was
    asked for by itself."""

    folder: Path
    model: str
    label: str | None = None
    named: bool = True


def found_in(names: Sequence[str]) -> tuple[list[Place], list[dict[str, Any]]]:
    """The runs to read, and the boards of the sweeps and suites among the names. Of a sweep a run for each point, of a suite one for
    each row."""
    places: list[Place] = []
    boards = []
    for name in names:
        if name == "last":
            from treadle.models.pretrained import home_of, locate

            name = str(home_of(locate("last").folder))
        folder = Path(name.partition("@")[0] if not Path(name).is_dir() else name)
        labelled: dict[str, str] = {}
        if (table := _table(folder / "suite.json")) is not None:
            boards.append(suite_board(table))
            labelled = {row["label"]: row["runs"][0] for row in table.get("rows", []) if row.get("runs")}
        elif (table := _table(folder / "sweep.json")) is not None:
            boards.append(sweep_board(table, folder))
            for cell in table.get("cells", []):
                labelled.setdefault(point_of(cell), cell["folder"])
        elif is_run(folder):
            places.append(Place(folder, name))
        else:
            raise InputError(f"{name} is no folder of a run, a sweep or a suite; runs lie in runs/ (`last` is the newest), and treadle "
                             "train makes one")  # fmt: skip
        for label, place in labelled.items():
            if (found := run_in(folder, place)) is not None and is_run(found):
                places.append(Place(found, str(found), label, named=False))
    return list({place.folder.resolve(): place for place in reversed(places)}.values())[::-1], boards


def _table(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise InputError(f"{path} is not readable: {problem}; run the same sweep or suite again to write it anew") from None
    return found if isinstance(found, dict) else None


def collected(places: list[Place], boards: list[dict[str, Any]], model: bool) -> dict[str, Any]:
    """Everything that report.js draws."""
    left_out = places[MOST_RUNS:]
    places = places[:MOST_RUNS]
    runs = [read_run(place.folder) for place in places]
    for place, run, label in zip(places, runs, labels_of(runs)):
        run["label"] = label if place.label is None else place.label
    _recolour(boards, [run["label"] for run in runs])
    if len(runs) > 1 and any(place.named for place in places):
        here, note = _measured_here(places, runs) if model else ({}, "From the runs' own logs.")
        boards = [*boards, runs_board(runs, here, note)]
    flops: float | None = None
    for place, run in zip(places, runs):
        tables = tables_of(place.folder)
        run["metrics"] = _metrics(tables)
        run["planned"] = {"rows": [], "note": ""}
        if tables:
            flops = _plan(run, tables, flops)
        run["text"], run["text_note"] = _text(place, run, tables) if model else (
            [], "No text is coloured: the report was made with --no-model.")  # fmt: skip
    one = runs[0] if len(runs) == 1 else None
    data = {
        "title": one["name"] if one is not None else f"{len(runs)} runs" if any(place.named for place in places) else boards[0]["title"],
        "lead": _lead(one) if one is not None else _leads(runs, left_out, any(board.get("problems") for board in boards)),
        "tiles": _tiles(one) if one is not None else [],
        "boards": boards,
        "differences": differences(runs) if len(runs) > 1 else None,
        "planner_note": "What treadle plan says of the same configuration, beside what the run measured.",
        "made": f"Made by treadle {versions()['treadle']} on {time.strftime('%Y-%m-%d %H:%M')}. This file asks no network.",
    }
    return {**data, "runs": [_small(run, max(60, POINTS // max(1, sum(len(r["columns"]) for r in runs)))) for run in runs]}


def _recolour(boards: list[dict[str, Any]], labels: list[str]) -> None:
    """Rows and bars of a sweep or suite in the colours of their curves; grey where no run is drawn yet."""
    for board in boards:
        for row in [*board["rows"], *(board["bars"] or {"rows": []})["rows"], *board.get("scaling", [])]:
            row["colour"] = labels.index(row["label"]) if row["label"] in labels else GREY


def labels_of(runs: list[dict[str, Any]]) -> list[str]:
    """Short names that differ: the run's name, its folder's, or as much of the path as it takes."""
    candidates = [[run["name"] for run in runs], [Path(run["folder"]).resolve().name for run in runs], [run["folder"] for run in runs]]
    return next((names for names in candidates if len(set(names)) == len(names)), candidates[-1])


def _metrics(tables: dict[str, Any]) -> dict[str, Any]:
    """How the objective's metrics are read; nothing for one whose code is not trusted here."""
    from treadle.evaluation.report import objective_of

    try:
        objective = objective_of(tables)
    except TreadleError:
        return {}
    return {name: {"format": metric.format, "lower_is_better": metric.lower_is_better} for name, metric in objective.metrics.items() if metric.shown}


def _text(place: Place, run: dict[str, Any], tables: dict[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Passages, and why there are none."""
    from treadle.models.pretrained import checkpoint_root
    from treadle.reporting.passages import read_passages

    if not tables or not any(checkpoint_root(place.folder).glob("*")):
        return [], "No text is coloured: this run has no checkpoint yet."
    terminal.write(f"measuring text of {run['label']}, token by token", sys.stderr)
    try:
        found = read_passages(place.model)
    except TreadleError as problem:
        return [], f"No text is coloured: {problem}"
    return found.passages, found.note


def _measured_here(places: list[Place], runs: list[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], str]:
    """Rows of reporting/compare.py by label, where the runs' held-out data is the same, and what to say of them."""
    from treadle.reporting.compare import compare

    try:
        rows = compare([place.model for place in places], rows=COMPARED_ROWS)
    except TreadleError as problem:
        return {}, f"From the runs' own logs; not measured beside each other: {problem}"
    found, same = {}, alike(runs)
    for run, row in zip(runs, rows):
        lower = {name: how["lower_is_better"] for name, how in row["shown"].items()} | {row["ranking"]: row["lower_is_better"]}
        kept = {name: rounded(row[name]) for name in row["shown"]
                if name not in ("perplexity", "top5_accuracy") and name in row and (same or name == row["ranking"])}  # fmt: skip
        costs = {name: row[name] for name in ("flops_per_byte", "flops_per_row", "state_bytes") if name in row}
        found[run["label"]] = {"metrics": kept, "costs": costs, "lower": lower}
    return found, (f"“Measured here”: {COMPARED_ROWS} rows of the same held-out data for every run (treadle compare measures all of it); "
                   "the rest is from the runs' own logs. ★: the best of a column."
                   + ("" if same else " Tokens are not the same for all runs, so that numbers a token (loss, accuracy, tokens/s) do not compare."))  # fmt: skip


def _plan(run: dict[str, Any], tables: dict[str, Any], flops: float | None) -> float | None:
    """Puts beside a run what is planned of its recipe, and the keys that are not at their default. Operations a second, as soon as
    they are known."""
    from treadle.reporting.planned import no_plan, planned, recipe_of

    try:
        recipe = recipe_of(tables)
    except (TreadleError, ValueError, TypeError) as problem:
        run["planned"] = no_plan(problem)
        return flops
    run["changed"] = list(flat(recipe.set_values()))
    run["planned"] = planned(recipe, run, flops)
    reached: float | None = run["planned"].pop("flops", None)
    return reached or flops


def _status(run: dict[str, Any]) -> str:
    return str((run["summary"] or {}).get("status", "unfinished"))


def _lead(run: dict[str, Any]) -> str:
    summary, environment = run["summary"] or {}, run["environment"] or {}
    arch = architecture(run["config"].get("model.arch", "a model"), run["config"].get("model.layer_types"))
    size = f" of {_amount(summary['parameters'])} parameters" if summary.get("parameters") else ""
    data = run["config"].get("data.path") or run["config"].get("data.dataset_class")
    on = f", trained on {shown(data)}" if data else ""
    gpus, threads = environment.get("gpus") or [], environment.get("threads", "?")
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"a CPU, {threads} thread{'s' * (threads != 1)}" if environment else ""
    return f"{arch}{size}{on}" + (f"; {summary.get('precision', '')} on {where}" if where else "")


def _amount(count: float) -> str:
    """24720 -> "24.7k"."""
    power = next((power for power in (3, 2, 1) if count >= 1000.0**power), 0)
    return f"{count / 1000.0**power:.3g}{('', 'k', 'M', 'G')[power]}"


def _leads(runs: list[dict[str, Any]], left_out: list[Place], failed: bool) -> str:
    if not runs:
        return "No run was trained; below the table stands why." if failed else "No run has begun yet."
    arches = list(dict.fromkeys(str(architecture(run["config"].get("model.arch", "?"), run["config"].get("model.layer_types"))) for run in runs))
    more = f"; {len(left_out)} more runs are not drawn: name some of them alone" if left_out else ""
    return ", ".join(arches) + more


def _tiles(run: dict[str, Any]) -> list[dict[str, Any]]:
    summary, was = run["summary"] or {}, measured(run)
    metric, value, step, _ = best_of(run)
    tokens = summary.get("tokens") or next((v for v in reversed(run["columns"].get("tokens", [])) if v), None)
    size = run["bytes_per_token"]
    tiles = [
        {"title": f"best {heading(metric)}" + (f", at step {step}" if step is not None else ""), "value": rounded(value)},
        {"title": "parameters", "value": summary.get("parameters")},
        {"title": f"steps of {summary['max_steps']:,}" if summary.get("max_steps") else "steps",
         "value": summary.get("step") or (run["steps"][-1] if run["steps"] else None)},
        {"title": "tokens seen" + (f", {_amount(tokens * size)}B of text" if size and tokens else ""), "value": tokens},
        {"title": "of training", "value": was["seconds"], "kind": "seconds"},
        {"title": "tokens a second", "value": was["tokens_per_second"]},
        {"title": "GB of memory at the peak", "value": was["memory_gb"]},
    ]  # fmt: skip
    return [tile for tile in tiles if tile["value"] is not None]


def _small(run: dict[str, Any], points: int) -> dict[str, Any]:
    """A run as the page holds it."""
    steps, columns = thinned(run["steps"], run["columns"], points)
    evaluations = [{name: rounded(value) for name, value in row.items()} for row in spread(run["evals"], max(60, points))]
    events, left = run["events"], 0
    if len(events) > MOST_EVENTS:  # saves are the many; what else happened stays, the newest first
        others = [event for event in events if event.get("event") != "saved" or event.get("best")][-MOST_EVENTS:]
        events, left = others, len(events) - len(others)
    environment = run["environment"] or {}
    known = ", ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())
    machine = [environment.get("platform"), f"{environment['cores']} cores" if environment.get("cores") else None,
               *(environment.get("gpus") or []), known]  # fmt: skip
    return {
        "name": run["name"], "label": run["label"], "status": _status(run), "config": run["config"], "changed": run.get("changed", []),
        "steps": steps, "columns": columns, "evals": evaluations, "bytes_per_token": run["bytes_per_token"],
        "samples": [{**sample, "text": sample["text"][:LONGEST_SAMPLE]} for sample in run["samples"]],
        "events": events, "events_note": f"{left} saves are left out." if left else "", "summary": run["summary"], "metrics": run["metrics"],
        "planned": run["planned"], "text": run["text"], "text_note": run["text_note"],
        "command": shlex.join(environment["command"]) if environment.get("command") else "", "machine": "; ".join(filter(None, machine)),
    }  # fmt: skip
