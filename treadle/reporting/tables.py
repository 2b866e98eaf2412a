"""The tables of a report: runs beside each other from their logs, sweeps and suites, and what differs between configurations.

A board is {"title", "note", "first", "columns": [{"key", "title", "unit", "lower_is_better", "kind"}], "rows": [{"label", "colour",
"cells"}], "bars": {"title", "rows"} or None}, which panels.js draws. No torch.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from treadle.errors import TreadleError
from treadle.reporting.run_data import json_table, measured, run_in

NAMES_ONLY = ("run.output_dir", "run.run_name", "run.trusted_code")
SPLIT = "validation"
STATE_AT = 1000  # tokens behind a decoding state that is compared; a constant one shows itself by being small here
HEADINGS = {"bpb": "bits/byte", "top5_accuracy": "top-5 accuracy", "flops_per_byte": "FLOPs/byte", "flops_per_row": "FLOPs/row",
            "state_bytes": f"state at {STATE_AT} tokens"}  # fmt: skip
BUDGETS = {"bytes": "bytes of text", "flops": "floating-point operations", "cpu_seconds": "CPU seconds"}  # of a suite


def best_of(run: dict[str, Any]) -> tuple[str, float | None, int | None, bool]:
    """(the metric a run is ranked by, its best value on held-out data, at which step, whether lower is better)."""
    summary = run["summary"] or {}
    known = {name for row in run["evals"] for name in row}
    name = summary.get("ranking_metric") or ("bpb" if "bpb" in known else "loss")
    lower = bool(summary.get("lower_is_better", True))
    found = [(row[name], row["step"]) for row in run["evals"] if row.get("split") == SPLIT and isinstance(row.get(name), (int, float))]
    if not found:
        return name, None, None, lower
    value, step = (min if lower else max)(found, key=lambda pair: pair[0])
    return name, value, step, lower


def architecture(arch: Any, layer_types: Any) -> Any:
    """What a run is called by: "transformer", or "transformer (gated_deltanet, full_attention)" where its blocks are not all of full
    attention. layer_types: as the configuration has it, None where the model has no such key."""
    if not isinstance(layer_types, list) or not layer_types:
        return arch
    from treadle.layers.token_mixers import TOKEN_MIXERS

    def canonical(name: str) -> str:
        try:
            return TOKEN_MIXERS.canonical(name)
        except TreadleError:  # code of one's own, which is not loaded here
            return name

    kinds = list(dict.fromkeys(canonical(str(name)) for name in layer_types))
    return arch if kinds == ["full_attention"] else f"{arch} ({', '.join(kinds)})"


def runs_board(runs: list[dict[str, Any]], measured_here: dict[str, dict[str, Any]], note: str) -> dict[str, Any]:
    """measured_here: what reporting/compare.py found, by the run's label."""
    bests = {run["label"]: best_of(run) for run in runs}
    metrics = {best[0] for best in bests.values()}
    columns: list[dict[str, Any]] = [{"key": "architecture", "title": "architecture"},
                                     {"key": "parameters", "title": "parameters"}, {"key": "step", "title": "steps"}]  # fmt: skip
    for metric in sorted(metrics):
        lower = next(best[3] for best in bests.values() if best[0] == metric)
        columns.append({"key": f"best {metric}", "title": f"best {heading(metric)}", "lower_is_better": lower, "unit": "while training"})
    first = next(iter(measured_here.values()), None)
    if first is not None:
        columns += [{"key": f"here {name}", "title": heading(name), "unit": "measured here", "lower_is_better": first["lower"].get(name)}
                    for name in first["metrics"]]  # fmt: skip
        costs = {name for one in measured_here.values() for name in one["costs"]}
        columns += [{"key": f"here {name}", "title": heading(name), "unit": "bytes" if name == "state_bytes" else None, "lower_is_better": None}
                    for name in sorted(costs)]  # fmt: skip
    same = alike(runs)
    columns += [{"key": "tokens_per_second", "title": "tokens/s", "lower_is_better": False if same else None},
                {"key": "memory_gb", "title": "peak memory", "unit": "GB", "lower_is_better": True},
                {"key": "cpu_seconds", "title": "CPU time", "kind": "seconds", "lower_is_better": True}]  # fmt: skip
    rows = []
    for number, run in enumerate(runs):
        summary, was, best = run["summary"] or {}, measured(run), bests[run["label"]]
        here = measured_here.get(run["label"], {"metrics": {}, "costs": {}})
        cells = {"architecture": architecture(run["config"].get("model.arch"), run["config"].get("model.layer_types")),
                 "parameters": summary.get("parameters"),
                 "step": summary.get("step", run["steps"][-1] if run["steps"] else None), f"best {best[0]}": best[1],
                 "tokens_per_second": was["tokens_per_second"], "memory_gb": was["memory_gb"],
                 "cpu_seconds": summary.get("cpu_seconds"),
                 **{f"here {name}": value for name, value in (here["metrics"] | here["costs"]).items()}}  # fmt: skip
        rows.append({"label": run["label"], "colour": number, "cells": cells})
    used = [column for column in columns if any(row["cells"].get(column["key"]) is not None for row in rows)]
    picture = None
    if len(metrics) == 1:
        metric = next(iter(metrics))
        picture = {"title": f"best {heading(metric)}",
                   "rows": [{"label": row["label"], "mean": row["cells"][f"best {metric}"], "colour": row["colour"]} for row in rows]}  # fmt: skip
    return {"title": "Comparison", "note": note, "first": "run", "columns": used, "rows": rows, "bars": picture}


def alike(runs: list[dict[str, Any]]) -> bool:
    """Whether a token means the same to all runs, so that numbers a token compare."""
    keys = ("tokenizer.name", "tokenizer.vocab_size")
    return len({(*map(run["config"].get, keys), run["bytes_per_token"]) for run in runs}) == 1


def heading(name: str) -> str:
    """What every table calls a metric or a cost, by the name that rows have for it."""
    return HEADINGS.get(name, name.replace("_", " "))


def point_of(cell: dict[str, Any]) -> str:
    """What a cell of a sweep.json is called by: "optim.learning_rate=1e-3 model.hidden_size=64"."""
    return " ".join(f"{key}={value}" for key, value in cell["point"].items())


def _direction(cells: list[dict[str, Any]], folder: Path) -> bool | None:
    """Whether less of a sweep's metric is better, as its runs' objective says: in sweep.json, or (of one that an older version wrote) in the
    summary of a run. None where nothing says it."""
    for cell in cells:
        if isinstance(said := cell.get("lower_is_better"), bool):
            return said
        if cell.get("metric") and (run := run_in(folder, cell["folder"])) is not None:
            said = (json_table(run / "summary.json") or {}).get("lower_is_better")
            if isinstance(said, bool):
                return said
    return None


def sweep_board(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The board of a sweep.json: a row for each point of the grid, the best mean first (as in the grid where no run says what is better)."""
    points: dict[str, list[dict[str, Any]]] = {}
    for cell in table.get("cells", []):
        points.setdefault(point_of(cell), []).append(cell)
    metric = next((cell["metric"] for cells in points.values() for cell in cells if cell.get("metric")), "loss")
    lower = _direction(table.get("cells", []), folder)
    rows: list[dict[str, Any]] = []
    for label, cells in points.items():
        values = [cell["value"] for cell in cells if isinstance(cell.get("value"), (int, float))]
        spent = [cell["cpu_seconds"] for cell in cells if cell.get("value") is not None]
        mean = {"mean": statistics.mean(values), "low": min(values), "high": max(values)} if values else None
        failed = sum(bool(cell.get("failed")) for cell in cells)
        rows.append({"label": label, "cells": {"value": mean, "seeds": len(values), "failed": failed or None,
                                               "cpu_seconds": statistics.mean(spent) if spent else None}})  # fmt: skip
    sign = 1 if lower else -1
    seeds = any(row["cells"]["seeds"] > 1 for row in rows)
    if lower is not None:
        rows.sort(key=lambda row: sign * float(row["cells"]["value"]["mean"]) if row["cells"]["value"] else float("inf"))
    for number, row in enumerate(rows):
        row["colour"] = number
    columns: list[dict[str, Any]] = [{"key": "value", "title": heading(metric), "lower_is_better": lower, "unit": "mean, range over seeds" if seeds else None},
               {"key": "seeds", "title": "seeds"}, {"key": "failed", "title": "failed"},
               {"key": "cpu_seconds", "title": "CPU time", "kind": "seconds"}]  # fmt: skip
    if not any(row["cells"]["failed"] for row in rows):
        columns = [column for column in columns if column["key"] != "failed"]
    done = sum(cell.get("value") is not None for cells in points.values() for cell in cells)
    count = sum(map(len, points.values()))
    return {"title": f"Sweep {folder.resolve().name}", "note": f"{done} of {count} runs have been evaluated.", "first": "point", "columns": columns,
            "rows": rows, "bars": {"title": heading(metric), "ranked": lower is not None, "rows": [{"label": r["label"], "colour": r["colour"], **(r["cells"]["value"] or {})} for r in rows]}}  # fmt: skip


def suite_board(table: dict[str, Any]) -> dict[str, Any]:
    """The board of a suite.json: its own columns, the paired differences, and curves over sizes."""
    kinds = {"s": "seconds", "seconds": "seconds", "CPU s": "seconds", "share right": "share"}
    columns = [{**column, "kind": kinds.get(column.get("unit"))} for column in table.get("columns", [])]
    rows = []
    for number, row in enumerate(table.get("rows", [])):
        cells = dict(row.get("cells", {}))
        paired = row.get("paired")
        if isinstance(paired, dict) and isinstance(paired.get("difference"), (int, float)):
            cells["paired"] = {"mean": paired["difference"], "low": paired.get("low"), "high": paired.get("high")}
        cells["learning_rate"], cells["parameters"] = row.get("learning_rate"), row.get("parameters")
        rows.append({"label": row["label"], "colour": number, "cells": cells})
    against = next((row["paired"].get("against") for row in table.get("rows", []) if isinstance(row.get("paired"), dict)), None)
    if against is not None:
        columns.insert(1, {"key": "paired", "title": f"difference to {against}", "unit": "paired by seed", "lower_is_better": None})
    known = {column["key"] for column in columns}
    columns += [{"key": key, "title": key.replace("_", " ")} for key in ("learning_rate", "parameters")
                if key not in known and any(row["cells"].get(key) is not None for row in rows)]  # fmt: skip
    jobs, cost = table.get("jobs", []), table.get("cost") or {}
    done = sum(job.get("state") == "done" for job in jobs)
    asked = table.get("budget") or {}
    budget = ", ".join(f"{asked[key]:,.0f} {word}" for key, word in BUDGETS.items() if isinstance(asked.get(key), (int, float)))
    budget += f" and has {asked['seeds']} seeds" if budget and asked.get("seeds") else ""
    note = f"{done} of {len(jobs)} jobs done." if not table.get("done", True) else ""
    note = " ".join(filter(None, [f"Every entry may spend {budget}." if budget else "", note, _cost(cost)]))
    metric = next((column for column in columns if column["key"] == table.get("metric")), None)
    picture = None
    if metric is not None:
        found = [{"label": row["label"], "colour": row["colour"], **row["cells"][metric["key"]]} for row in rows
                 if isinstance(row["cells"].get(metric["key"]), dict)]  # fmt: skip
        picture = {"title": metric.get("title", metric["key"]), "rows": sorted(found, key=lambda one: one.get("mean") or 0.0,
                                                                               reverse=metric.get("lower_is_better") is False)}  # fmt: skip
    return {"title": f"Suite {table.get('name', '')}".strip(), "note": note, "first": "entry", "columns": columns, "rows": rows, "bars": picture,
            "problems": [f"{job.get('label')}: {job['problem']}" for job in jobs if job.get("problem")], **_scaling(table)}  # fmt: skip


def _cost(cost: dict[str, Any]) -> str:
    spent, search = cost.get("cpu_seconds"), cost.get("of_search")
    if not isinstance(spent, (int, float)):
        return ""
    return f"{spent:,.0f} CPU seconds in all" + (f", {search:,.0f} of them for choosing learning rates." if isinstance(search, (int, float)) else ".")


def _scaling(table: dict[str, Any]) -> dict[str, Any]:
    """Values against parameters, and the fitted power law factor parameters^-exponent between the smallest and the largest size."""
    lines, laws = [], []
    for line in table.get("scaling") or []:
        points = sorted((point["parameters"], point["value"]) for point in line.get("points", []) if point.get("parameters"))
        if not points:
            continue
        made: dict[str, Any] = {"label": line.get("label", ""), "points": [{"x": x, "value": value} for x, value in points]}
        if isinstance(law := line.get("fit"), dict):
            sizes = [points[0][0] * (points[-1][0] / points[0][0]) ** (number / 16) for number in range(17)]
            made["curve"] = {"x": sizes, "y": [law["factor"] * size ** -law["exponent"] for size in sizes]}
            laws.append(f"{made['label']}: exponent {law['exponent']:.3f} ({law['low']:.3f} to {law['high']:.3f})")
        elif line.get("refused"):
            laws.append(f"{made['label']}: no law, {line['refused']}")
        lines.append(made)
    return {"scaling": lines, "scaling_x": "parameters", "scaling_note": "a dot a size; " + "; ".join(laws)} if lines else {}


def differences(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Keys whose values are not the same for all runs, with the commonest value of each (None where no value is common); "own": those
    of the model where the runs' architectures are different ones."""
    keys = list(dict.fromkeys(key for run in runs for key in run["config"]))
    several = len({run["config"].get("model.arch") for run in runs}) > 1
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "own": []}
    for key in keys:
        values = [shown(run["config"][key]) if key in run["config"] else None for run in runs]
        if key in NAMES_ONLY or len(set(values)) == 1:
            continue
        usual = statistics.mode(values)
        row = {"key": key, "values": values, "usual": usual if values.count(usual) > len(values) / 2 else None}
        found["own" if several and key.startswith("model.") and key != "model.arch" else "rows"].append(row)
    return {**found, "note": "Values that are not those of most runs are marked." if len(runs) > 2 else ""}


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
