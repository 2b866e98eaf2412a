"""`treadle eval`: a run's metrics beside baselines, customary ranges and samples, printed and written down."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from treadle.data.dataset import Dataset, load_splits
from treadle.data.settings import DataSettings
from treadle.errors import InputError
from treadle.evaluation.baselines import baselines
from treadle.evaluation.evaluator import Evaluator
from treadle.evaluation.text_checks import sample_texts
from treadle.files import write_atomically
from treadle.models.pretrained import Loaded, load_run
from treadle.monitor.records import write_json
from treadle.text.base import Tokenizer
from treadle.text.settings import TokenizerSettings

# What a well-trained small model usually reaches on plain English text; a value outside is marked, not judged.
CUSTOMARY = {"bpb": ("<", 1.5), "perplexity": ("<", 20.0), "accuracy": (">", 0.30), "top5_accuracy": (">", 0.60),
             "utf8_validity": (">", 0.95)}  # fmt: skip
PROMPTS = ("\n", "The ", "She ", "It was ", "In the ")


def held_out(config: dict[str, Any], tokenizer: Tokenizer, data: str | None, split: str = "validation") -> dict[str, Dataset]:
    """The splits a run is evaluated on: those of its own text, or all of another text, called `split`."""
    section = dict(config.get("data", {}))
    if data is not None:
        section = {"path": data, "seq_len": section.get("seq_len", 256), "validation_fraction": 0.0,
                   "text_column": section.get("text_column", "text"), "cache_dir": section.get("cache_dir")}  # fmt: skip
    splits = load_splits(DataSettings(**section), TokenizerSettings(), tokenizer)
    if data is not None:
        return {split: splits["train"]}
    if split not in splits:
        have = ", ".join(name for name in splits if name != "train") or "nothing"
        raise InputError(f"this run held out {have} and no {split} text; give text to evaluate on: --data FILE")
    return splits


def evaluator_of(loaded: Loaded) -> Evaluator:
    """Evaluates a run in the number format it was trained in."""
    precision = loaded.config.get("train", {}).get("precision", "fp32")
    return Evaluator(loaded.model, loaded.tokenizer, "fp32" if precision == "auto" else precision)


def evaluate_run(
    run: str, data: str | None = None, rows: int | None = None, samples: int = 0, batch_size: int = 16,
    with_baselines: bool = True, device: str = "auto", stats: bool = False, split: str = "validation",
) -> dict[str, Any]:  # fmt: skip
    """Everything `treadle eval` says about one run, as a table of plain numbers."""
    loaded = load_run(run, device)
    splits = held_out(loaded.config, loaded.tokenizer, data, split)
    evaluator, text = evaluator_of(loaded), splits[split]
    metrics = evaluator.evaluate(text, batch_size, rows) or {}
    report: dict[str, Any] = {
        "run": run,
        "checkpoint": str(loaded.checkpoint.folder),
        "step": loaded.checkpoint.step,
        "data": data or f"{split} text of the run",
        "metrics": metrics,
    }
    if stats:
        report["stats"] = evaluator.inspect(text)
    if with_baselines:
        report["baselines"] = baselines(splits.get("train", text), text, loaded.tokenizer)
    if samples and loaded.model.capabilities.decodes:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(samples)]
        report["samples"], checks = sample_texts(loaded.model, loaded.tokenizer, prompts, 150, temperature=0.8)
        report["metrics"] = {**metrics, **checks}
    report["outside_customary"] = [n for n, v in report["metrics"].items() if not customary(n, v)]
    return report


def customary(name: str, value: float) -> bool:
    """False when a value lies outside what is usual."""
    if name not in CUSTOMARY or not math.isfinite(value):
        return name not in CUSTOMARY
    sign, bound = CUSTOMARY[name]
    return value < bound if sign == "<" else value > bound


def table_of(reports: list[dict[str, Any]]) -> list[str]:
    """Lines for people: one column a run, baselines below, values outside the customary range marked."""
    names = [n for n in reports[0]["metrics"] if n not in ("labels", "bytes")]
    width = max(18, *(len(r["run"]) + 2 for r in reports))
    lines = ["".ljust(16) + "".join(r["run"].rjust(width) for r in reports) + "   customary"]
    lines.append("step".ljust(16) + "".join(str(r["step"]).rjust(width) for r in reports))
    for name in names:
        cells = [f"{r['metrics'][name]:.4f}{'' if customary(name, r['metrics'][name]) else ' *'}" for r in reports]
        sign, bound = CUSTOMARY.get(name, ("", ""))
        lines.append(name.ljust(16) + "".join(c.rjust(width) for c in cells) + f"   {sign} {bound}".rstrip())
    for name, values in reports[0].get("baselines", {}).items():
        lines.append(f"{name}: {values['bpb']:.4f} bits per byte, loss {values['loss']:.4f}")
    if any(r["outside_customary"] for r in reports):
        lines.append("* outside the customary range")
    return lines


def write_results(folder: Path, report: dict[str, Any]) -> None:
    """results/evaluation_results.json and, with samples, results/generations.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation_results.json", report)
    if "samples" in report:
        text = "\n\n".join(f"=== {json.dumps(s['prompt'])}\n{s['prompt']}{s['text']}" for s in report["samples"])
        write_atomically(folder / "generations.txt", text + "\n")
