"""What tests of reports share: folders of runs as training writes them, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from treadle.settings import dump_toml
from treadle.training.config import Recipe

ENDS_A_SCRIPT = "</script><script>document.title = 'taken over'</script><!-- \u2028 🧵"


def write_run(folder: Path, steps: int = 40, name: str = "one", loss: float = 3.0, **changed: Any) -> Path:
    """config.toml, metrics.jsonl, events.jsonl, samples, summary.json and environment.json of `steps` steps; no checkpoint."""
    recipe = Recipe(model={"vocab_size": 256, "hidden_size": 32, "num_layers": 2, "num_heads": 2, **changed.pop("model", {})})
    recipe.run.run_name, recipe.run.output_dir, recipe.data.path, recipe.tokenizer.name = name, str(folder), "story.txt", "byte"
    recipe.optim.learning_rate = changed.pop("learning_rate", recipe.optim.learning_rate)
    (folder / "samples").mkdir(parents=True)
    (folder / "config.toml").write_text(dump_toml(recipe.tables()))
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        value = loss / math.sqrt(step) + 1 + (4.0 if step == steps // 2 else 0.0)
        rows.append({"step": step, "loss": value, "bpb": value / math.log(2), "learning_rate": 1e-3, "grad_norm": 1.0 + step % 3, "tokens": 256 * step,
                     "tokens_per_second": 1000.0 + step, "memory_gb": 0.3, "seconds": 0.25 * step, "skipped_steps": 0,
                     "routing_sigma_max": 1.2, "routing_sigma_min": 0.8})  # fmt: skip
        if step % max(1, steps // 4) == 0:
            rows.append({"step": step, "split": "validation", "loss": value, "bpb": value / math.log(2), "accuracy": 0.5, "labels": 100.0, "bytes": 200.0})
            (folder / "samples" / f"step-{step:08d}.txt").write_text(f"said at {step}: {ENDS_A_SCRIPT}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {"micro_batch": 4, "max_steps": steps}
    happened = [{"event": "started", "step": 0, "precision": "fp32", "plan": plan}, {"event": "saved", "step": steps // 4, "best": True},
                {"event": "rolled_back", "step": steps // 2, "to": steps // 4, "reason": f"loss was not finite {ENDS_A_SCRIPT}"},
                {"event": "command", "step": steps // 2 + 2, "line": "set learning_rate=1e-4"}, {"event": "finished", "step": steps}]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": "2026-01-02T03:04:05+0000", **event}) + "\n" for event in happened))
    summary = {"status": "finished", "step": steps, "max_steps": steps, "tokens": 256 * steps, "seconds": 0.25 * steps, "cpu_seconds": 9.0,
               "parameters": 27_000, "architecture": "transformer", "precision": "fp32", "processes": 1, "peak_memory_gb": 0.35,
               "ranking_metric": "bpb", "lower_is_better": True, **changed}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "2"}, "platform": "Linux", "threads": 1, "cores": 2, "gpus": [],
                                                         "command": ["treadle", "train", "story.txt"]}))  # fmt: skip
    return folder
