"""`treadle compare`: runs or checkpoints in one table, measured on the same text: quality, size, cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.data.dataset import Dataset
from treadle.errors import InputError
from treadle.evaluation.report import evaluator_of, held_out
from treadle.models.pretrained import Loaded, checkpoint_root, load_run, locate, read_config, read_tokenizer
from treadle.text.base import Tokenizer

METRICS = ("bpb", "loss", "perplexity", "accuracy", "top5_accuracy")
STATE_AT = 1000  # symbols; a constant state shows itself by being small here


def expand(runs: list[str]) -> list[str]:
    """RUN@all -> each of its checkpoints, oldest first."""
    found = []
    for run in runs:
        name, _, choice = run.partition("@")
        if choice != "all":
            found.append(run)
            continue
        root = checkpoint_root(Path(name))
        steps = sorted(steps_in(root)) if root.is_dir() else []
        if not steps:
            raise InputError(f"{name} holds no checkpoint; train it: treadle train")
        found += [str(root / checkpoint_name(step)) for step in steps]
    return found


def compare(
    runs: list[str], data: str | None = None, split: str = "validation", rows: int | None = None, batch_size: int = 16,
    device: str = "auto",
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a run. Without `data` each is measured on its own held-out text, which must be the same text for all; InputError
    where it is not."""
    names = expand(runs)
    found, texts = [], {}
    for run in names:  # all texts before the first, long evaluation
        checkpoint = locate(run)
        tokenizer = read_tokenizer(checkpoint)
        held = held_out(read_config(checkpoint), tokenizer, data, split)[split]
        found.append((str(checkpoint.folder), held))
        texts[_text(tokenizer, held)] = run
        if len(texts) > 1:
            one, other = texts.values()
            raise InputError(f"{one} and {other} held out different text, on which their numbers do not compare; give one text for "
                             "all: --data FILE")  # fmt: skip
    return [_row(run, load_run(folder, device), held, rows, batch_size) for run, (folder, held) in zip(names, found)]


def _text(tokenizer: Tokenizer, held: Dataset) -> Any:
    """What tells one held-out text from another whatever its symbols are: how many bytes and documents it has, and its
    beginning."""
    first = tokenizer.decode(held.sets[0].document(0)[:256].tolist())[:64]
    return sum(s.statistics["bytes"] for s in held.sets), sum(s.documents() for s in held.sets), first


def _row(run: str, loaded: Loaded, held: Dataset, rows: int | None, batch_size: int) -> dict[str, Any]:
    model, length = loaded.model, held.seq_len
    metrics = evaluator_of(loaded).evaluate(held, batch_size, rows) or {}
    stats = held.stats()
    row = {"run": run, "step": loaded.checkpoint.step, "architecture": model.arch, **{name: metrics[name] for name in METRICS},
           "parameters": model.parameter_count(),
           "flops_per_byte": model.flops(length) / length / stats["bytes_per_token"]}  # fmt: skip
    if model.capabilities.decodes:
        row["state_bytes"] = model.state_bytes(1, STATE_AT)
    if "run_state.json" in loaded.checkpoint.members():
        row["symbols_seen"] = loaded.checkpoint.json("run_state.json").get("tokens")
    return row


COLUMNS = {
    "run": "run", "step": "step", "architecture": "architecture", "bpb": "bits/byte", "loss": "loss", "accuracy": "accuracy",
    "top5_accuracy": "top-5", "parameters": "parameters", "flops_per_byte": "FLOPs/byte", "state_bytes": f"state at {STATE_AT}",
    "symbols_seen": "symbols seen",
}  # fmt: skip


def lines_of(table: list[dict[str, Any]]) -> list[str]:
    """The table for people, best bits per byte marked."""
    best = min(table, key=lambda row: row["bpb"] if math.isfinite(row["bpb"]) else math.inf)
    cells = [list(COLUMNS.values())]
    for row in table:
        cells.append([_shown(name, row.get(name), row is best and len(table) > 1) for name in COLUMNS])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    left = ("run", "architecture")
    return ["  ".join(c.ljust(w) if name in left else c.rjust(w) for c, w, name in zip(line, widths, COLUMNS)).rstrip()
            for line in cells]  # fmt: skip


def _shown(name: str, value: Any, best: bool) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if name == "state_bytes":
        return f"{value / 1e3:,.0f} kB"
    if name == "flops_per_byte":
        return f"{value / 1e6:,.2f} M"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}{' <' if best and name == 'bpb' else ''}"
