"""What a suite found so far, as one plain table: suite.json, written again after every job, so that a page can follow it."""

from __future__ import annotations

import statistics
from typing import Any

from treadle.suite.design import Variant, probe_tables
from treadle.suite.jobs import DONE, FAILED, RUNNING, WAITING, Job, Jobs
from treadle.suite.scaling import fit
from treadle.suite.statistics import cell, paired

MEASURED = {"step_time_ratio": ("step time", "x the first", True), "tokens_per_second": ("training", "tokens/s", False),
            "decode_1k": ("decoding at 1k", "tokens/s", False), "decode_8k": ("decoding at 8k", "tokens/s", False),
            "state_1k": ("state at 1k", "bytes", True), "state_8k": ("state at 8k", "bytes", True)}  # fmt: skip
METRIC_UNITS = {"bpb": ("bits per byte", "bits"), "loss": ("loss", "nats"), "accuracy": ("accuracy", "share")}


def table(jobs: Jobs) -> dict[str, Any]:
    """{"name", "budget", "metric", "columns", "rows", "scaling", "jobs", "cost", "data", "done"}; the cells of a row hold mean, low,
    high (over the seeds) and values."""
    suite, settings = jobs.suite, jobs.suite.settings
    finals = [job for job in jobs.all if job.kind == "run" and job.summary is not None]
    metric, lower = jobs.variants[0].metric, jobs.variants[0].lower_is_better
    title, unit = METRIC_UNITS.get(metric, (metric, ""))
    columns = [_column(metric, title, unit, lower)]
    rows = [_row(jobs, variant, metric) for variant in jobs.variants]
    _pair(rows, jobs, len(suite.sizes))
    for key, (name, of, less) in MEASURED.items():
        columns += [_column(key, name, of, less)] if any(key in row["cells"] for row in rows) else []
    columns += [_column("peak_memory_gb", "peak memory", "GB", True)] if finals else []
    for probe in suite.probes.names if suite.probes else []:
        columns += [_column(probe, probe.replace("_", " "), "share right", False)] if any(probe in row["cells"] for row in rows) else []
    columns += [_column("cpu_seconds", "training", "CPU s", True)] if finals else []
    spent = {kind: sum(job.cpu_seconds for job in jobs.all if job.kind == kind) for kind in ("search", "run", "probe", "measure")}
    return {
        "name": suite.name,
        "budget": {suite.budget.unit: suite.budget.amount, "seeds": settings.seeds, "search_share": settings.search_share},
        "metric": metric,
        "columns": columns,
        "rows": [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows],
        "scaling": _scaling(jobs, rows, metric) if len(suite.sizes) > 1 else [],
        "jobs": [_job(job) for job in jobs.all],
        "cost": {"cpu_seconds": sum(spent.values()), "of_search": spent["search"], "of_runs": spent["run"], "of_probes": spent["probe"],
                 "of_measuring": spent["measure"]},
        "data": _data(jobs),
        "done": all(job.state in (DONE, FAILED) for job in jobs.all),
    }  # fmt: skip


def _column(key: str, title: str, unit: str, lower: bool) -> dict[str, Any]:
    return {"key": key, "title": title, "unit": unit, "lower_is_better": lower}


def _row(jobs: Jobs, variant: Variant, metric: str) -> dict[str, Any]:
    finals = [job for job in jobs.of(variant, "run") if job.state == DONE]
    by_seed = {job.seed: float(job.values[metric]) for job in finals if job.values and metric in job.values}
    cells: dict[str, Any] = {metric: cell(list(by_seed.values()))}
    for job in jobs.of(variant, "measure"):
        cells |= {key: cell([job.values[key]]) for key in MEASURED if job.values and key in job.values}
    memory = [job.summary["peak_memory_gb"] for job in finals if job.summary and job.summary.get("peak_memory_gb")]
    cells["peak_memory_gb"], cells["cpu_seconds"] = cell(memory), cell([job.cpu_seconds for job in finals])
    for job in jobs.of(variant, "probe"):
        cells |= {job.probe: cell([job.values["accuracy"]])} if job.values and "accuracy" in job.values else {}
    rates = jobs.suite.rates(variant.entry)
    chosen = jobs.chosen_rate(variant)
    return {
        "label": variant.entry.label, "architecture": variant.arch, "size": variant.size, "learning_rate": chosen,
        "learning_rate_at_edge": len(rates) > 2 and chosen in (min(rates), max(rates)), "parameters": variant.parameters,
        "steps": variant.steps, "bytes": variant.steps * variant.bytes_per_step, "flops": variant.steps * variant.flops_per_step,
        "cells": {key: value for key, value in cells.items() if value is not None},
        "runs": [str(job.folder) for job in jobs.of(variant, "run") if job.folder is not None], "paired": None, "_by_seed": by_seed,
    }  # fmt: skip


def _pair(rows: list[dict[str, Any]], jobs: Jobs, sizes: int) -> None:
    """Against the first entry of the same size."""
    for number, row in enumerate(rows[sizes:], sizes):
        first = rows[number % sizes]
        found = paired(row["_by_seed"], first["_by_seed"])
        row["paired"] = None if found is None else {"against": first["label"], **found}


def _scaling(jobs: Jobs, rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    found = []
    for label in dict.fromkeys(row["label"] for row in rows):
        points = [{"parameters": row["parameters"], "flops": row["flops"], "value": row["cells"][metric]["mean"]}
                  for row in rows if row["label"] == label and metric in row["cells"]]  # fmt: skip
        law = fit([(point["parameters"], point["value"]) for point in points])
        refused = law.get("refused")
        found.append({"label": label, "points": points, "fit": None if refused else law, "refused": refused})
    return found


def _data(jobs: Jobs) -> dict[str, Any]:
    """Whether all entries of one tokenizer saw the same rows in the same order, as their runs' data say, seed by seed."""
    prints: dict[int, set[str]] = {}
    for job in jobs.all:
        if job.kind == "run" and job.summary is not None:
            prints.setdefault(job.seed, set()).add(job.summary.get("data_fingerprint", ""))
    same = all(len(found) == 1 for found in prints.values()) and len({(v.rows, v.seq_len) for v in jobs.variants}) == 1
    return {"same_rows_in_the_same_order": same if prints else None, "bytes_per_step": [v.bytes_per_step for v in jobs.variants]}


def _job(job: Job) -> dict[str, Any]:
    return {"label": job.label, "kind": job.kind, "seed": job.seed, "learning_rate": job.learning_rate, "state": job.state,
            "folder": None if job.folder is None else str(job.folder), "cpu_seconds": job.cpu_seconds, "problem": job.problem}  # fmt: skip


def counts(jobs: Jobs) -> dict[str, int]:
    return {state: sum(job.state == state for job in jobs.all) for state in (WAITING, RUNNING, DONE, FAILED)}


def probe_size(jobs: Jobs) -> float | None:
    """Mean parameters of the probes' models."""
    if jobs.suite.probes is None or not jobs.suite.probes.names:
        return None
    return statistics.mean(probe_tables(jobs.suite, variant, jobs.suite.probes.names[0])[1] for variant in jobs.variants)
