"""`treadle eval`: a run's metrics beside baselines, usual ranges and samples, printed and written down."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from treadle.data.base import DATASETS, Dataset
from treadle.data.dataset import splits_of
from treadle.data.settings import TEXT, DataSettings
from treadle.data.sources import TextSource, open_source
from treadle.errors import InputError
from treadle.evaluation.evaluator import Evaluator
from treadle.files import write_atomically
from treadle.generation.reading import in_format
from treadle.models.pretrained import Loaded, load_run
from treadle.models.quantized import quantize_once
from treadle.monitor.records import write_json
from treadle.objectives.base import OBJECTIVES, Metric, Objective
from treadle.objectives.settings import DEFAULT_OBJECTIVE
from treadle.objectives.task import task_settings
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings

CONVERSATIONS = "conversations"  # data.dataset_class of runs that answer


def held_out(
    config: dict[str, Any], tokenizer: Tokenizer | None, data: str | None, split: str = "validation"
) -> dict[str, Dataset]:
    """The splits a run is evaluated on: those of its own data, or all of another text, called `split`. InputError where
    there is no such text."""
    if data is None and "data" not in config:
        raise InputError("this model was not trained here, so it has no held-out text of its own; give some: --data FILE")
    section, seed = dict(config.get("data", {})), config.get("run", {}).get("seed", 0)
    kind = section.get("dataset_class", TEXT)
    if data is not None:
        if kind != TEXT and not DATASETS.get(kind).reads_files:
            raise InputError(f"this run was trained on {section['dataset_class']}, which reads no file; leave --data out")
        kept = {key: section[key] for key in ("dataset_class", "chat_template", "train_on") if key in section}
        if kind == CONVERSATIONS and isinstance(open_source(data), TextSource):
            kept = {}  # plain text has no turns: every token is predicted, as by the run that this one may be compared with
        section = {**kept, "path": data, "seq_len": section.get("seq_len", 256), "validation_fraction": 0.0,
                   "text_column": section.get("text_column", "text"), "cache_dir": section.get("cache_dir")}  # fmt: skip
    splits = splits_of(DataSettings(**section), TokenizerSettings(), task_settings(config), seed, tokenizer)
    if data is not None:
        return {split: splits["train"]}
    if split not in splits:
        have = ", ".join(name for name in splits if name != "train") or "nothing"
        raise InputError(f"this run held out {have} and no {split} split; give text to evaluate on: --data FILE")
    return splits


def objective_of(config: dict[str, Any]) -> Objective:
    """What a run's model is measured by; a student of a teacher by next-token prediction."""
    return OBJECTIVES.get(config.get("train", {}).get("objective", DEFAULT_OBJECTIVE))(task_settings(config))


def evaluator_of(loaded: Loaded) -> Evaluator:
    """Evaluates a run in the number format it was trained in."""
    precision = loaded.config.get("train", {}).get("precision", "fp32")
    return Evaluator(loaded.model, loaded.tokenizer, "fp32" if precision == "auto" else precision,
                     objective=objective_of(loaded.config))  # fmt: skip


def evaluate_run(
    run: str, data: str | None = None, rows: int | None = None, samples: int = 0, batch_size: int = 16,
    with_baselines: bool = True, device: str = "auto", stats: bool = False, split: str = "validation",
    weights: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything `treadle eval` says about one run, as a table of plain numbers. weights: what its linear layers are read in;
    all is computed in fp32 then, and "weights" says what they cost."""
    loaded = load_run(run, device)
    whole = loaded.model
    if weights is not None:
        loaded = replace(loaded, model=in_format(whole, quantize_once(loaded, weights)),
                         config={**loaded.config, "train": {**loaded.config.get("train", {}), "precision": "fp32"}})  # fmt: skip
    splits = held_out(loaded.config, loaded.tokenizer, data, split)
    evaluator, held = evaluator_of(loaded), splits[split]
    objective = evaluator.objective
    objective.prepare(loaded.model, held, loaded.model.device)
    metrics = evaluator.evaluate(held, batch_size, rows) or {}
    report: dict[str, Any] = {
        "run": run,
        "checkpoint": str(loaded.checkpoint.folder),
        "step": loaded.checkpoint.step,
        "data": data or f"{split} split of the run",
        "metrics": metrics,
    }
    if weights is not None:
        before = evaluator_of(replace(loaded, model=whole)).evaluate(held, batch_size, rows) or {}
        report["weights"] = {"format": weights, "loss_fp32": before["loss"], "loss_change": metrics["loss"] - before["loss"]}
    if stats:
        report["stats"] = evaluator.inspect(held)
    if with_baselines and (found := objective.baselines(splits.get("train", held), held)):
        report["baselines"] = found
    if samples:
        shown, checks = objective.samples(loaded.model, held, samples)
        if shown:
            report["samples"], report["metrics"] = shown, {**metrics, **checks}
    report["outside_customary"] = [n for n, v in report["metrics"].items() if not usual(objective.metric(n), v)]
    report["shown"] = objective.shown(report["metrics"])
    return report


def usual(metric: Metric, value: float) -> bool:
    """False when a value lies outside what is usual."""
    if metric.usual is None or not math.isfinite(value):
        return metric.usual is None
    sign, bound = metric.usual
    return value < bound if sign == "<" else value > bound


def table_of(reports: list[dict[str, Any]]) -> list[str]:
    """Lines for people: one column a run, baselines below, values outside the customary range marked."""
    shown = {name: how for report in reports for name, how in report["shown"].items()}
    width = max(18, *(len(r["run"]) + 2 for r in reports))
    any_usual = any(how["usual"] for how in shown.values())
    lines = ["".ljust(16) + "".join(r["run"].rjust(width) for r in reports) + ("   customary" if any_usual else "")]
    lines.append("step".ljust(16) + "".join(str(r["step"]).rjust(width) for r in reports))
    for name, how in shown.items():
        cells = [_cell(r, name, how["format"]) for r in reports]
        bound = "   " + " ".join(map(str, how["usual"])) if how["usual"] else ""
        lines.append(name.ljust(16) + "".join(c.rjust(width) for c in cells) + bound)
    for name, values in reports[0].get("baselines", {}).items():
        numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in sorted(values.items()))
        lines.append(f"{name}: {numbers}")
    for report in reports:
        if "weights" in report:
            cost = report["weights"]
            lines.append(f"{report['run']}: {cost['format']} weights change the loss by {cost['loss_change']:+.5f} from "
                         f"{cost['loss_fp32']:.5f} in fp32")  # fmt: skip
    if any(r["outside_customary"] for r in reports):
        lines.append("* outside the customary range, that of a model of text that was trained for long")
    return lines


def _cell(report: dict[str, Any], name: str, how: str) -> str:
    if name not in report["metrics"]:
        return "-"
    return format(report["metrics"][name], how) + (" *" if name in report["outside_customary"] else "")


def write_results(folder: Path, report: dict[str, Any]) -> None:
    """results/evaluation_results.json and, with samples, results/generations.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation_results.json", report)
    if "samples" in report:
        text = "\n\n".join(f"=== {json.dumps(s['prompt'])}\n{s['prompt']}{s['text']}" for s in report["samples"])
        write_atomically(folder / "generations.txt", text + "\n")
