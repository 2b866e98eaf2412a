"""`treadle compare`: runs or checkpoints in one table, measured on the same data: quality, size, cost."""

from __future__ import annotations

import math
import sys
import textwrap
from pathlib import Path
from typing import Any

from treadle import terminal
from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.data.base import Dataset
from treadle.data.dataset import TokenDataset
from treadle.errors import InputError
from treadle.evaluation.report import evaluator_of, held_out
from treadle.models.pretrained import Loaded, checkpoint_root, load_run, locate, read_config, read_tokenizer
from treadle.reporting.tables import STATE_AT, architecture, heading
from treadle.text.base import Tokenizer


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
    """One row a run. Without `data` each is measured on its own held-out data, which must be the same for all; InputError
    where it is not. Standard error says which one is being measured."""
    names = expand(runs)
    found, seen = [], {}
    for run in names:  # all data before the first, long evaluation
        checkpoint = locate(run)
        tokenizer = read_tokenizer(checkpoint)
        held = held_out(read_config(checkpoint), tokenizer, data, split)[split]
        found.append((str(checkpoint.folder), held))
        seen[_identity(tokenizer, held)] = run
        if len(seen) > 1:
            one, other = seen.values()
            hint = "give one text for all: --data FILE" if isinstance(held, TokenDataset) else "compare runs of one task"
            if data is not None:
                raise InputError(f"{one} and {other} read {data} in different ways (another chat template, another kind of data), so "
                                 "that their numbers do not compare; give a .txt file")  # fmt: skip
            raise InputError(f"{one} and {other} held out different {'text' if isinstance(held, TokenDataset) else 'data'}, on "
                             f"which their numbers do not compare; {hint}")  # fmt: skip
    table = []
    for number, (run, (folder, held)) in enumerate(zip(names, found), start=1):
        terminal.write(f"measuring {run} ({number} of {len(names)})", sys.stderr)
        table.append(_row(run, load_run(folder, device), held, rows, batch_size))
    return table


def _identity(tokenizer: Tokenizer | None, held: Dataset) -> Any:
    """What tells one held-out data set from another. Of text, whatever its tokens are: how many bytes and documents it has,
    and its beginning."""
    if tokenizer is None or not isinstance(held, TokenDataset):
        return held.fingerprint()
    first = tokenizer.decode(held.sets[0].document(0)[:256].tolist())[:64]
    return sum(s.statistics["bytes"] for s in held.sets), sum(s.documents() for s in held.sets), first


def _row(run: str, loaded: Loaded, held: Dataset, rows: int | None, batch_size: int) -> dict[str, Any]:
    model, evaluator = loaded.model, evaluator_of(loaded)
    evaluator.objective.prepare(model, held, model.device)
    metrics = evaluator.evaluate(held, batch_size, rows) or {}
    objective, ranking = evaluator.objective, evaluator.objective.ranking_metric
    shown = objective.shown(metrics)
    row = {"run": run, "step": loaded.checkpoint.step, "architecture": architecture(model.arch, getattr(model.config, "layer_types", None)),
           **{name: metrics[name] for name in sorted(shown, key=lambda name: name != ranking)},
           "parameters": model.parameter_count()}  # fmt: skip
    forward = model.flops(held.seq_len)
    if (size := held.stats().get("bytes_per_token")) is not None:
        row["flops_per_byte"] = forward / held.seq_len / size
    else:
        row["flops_per_row"] = forward
    if model.capabilities.decodes:
        row["state_bytes"] = model.state_bytes(1, STATE_AT)
    if "run_state.json" in loaded.checkpoint.members():
        row["tokens_seen"] = loaded.checkpoint.json("run_state.json").get("tokens")
    return {**row, "shown": shown, "ranking": ranking, "lower_is_better": objective.metric(ranking).lower_is_better}


LIKE_SIZES = 1.05
HIDDEN = ("shown", "ranking", "lower_is_better", "perplexity")


def lines_of(table: list[dict[str, Any]], width: int | None = None) -> list[str]:
    """The table for people; the best by the metric that the runs' objective ranks by is marked. width: characters of the terminal: where
    a line for each run does not fit, each gets a column."""
    columns = list(dict.fromkeys(name for row in table for name in row if name not in HIDDEN))
    ranking = table[0]["ranking"]
    sign = 1 if table[0]["lower_is_better"] else -1
    ranked = [row for row in table if isinstance(row.get(ranking), float) and math.isfinite(row[ranking])]
    same = len({row["ranking"] for row in table}) == 1
    best = min(ranked, key=lambda row: sign * row[ranking]) if ranked and same and len(table) > 1 else None
    cells = [[heading(name) for name in columns]]
    for row in table:
        cells.append([_cell(row, name, row is best and name == ranking) for name in columns])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    left = ("run", "architecture")
    lines = ["  ".join(c.ljust(w) if name in left else c.rjust(w) for c, w, name in zip(line, widths, columns)).rstrip()
             for line in cells]  # fmt: skip
    if width is not None and max(map(len, lines)) > width:
        heads, *runs = [max(map(len, line)) for line in cells]
        lines = ["  ".join([one[0].ljust(heads), *(cell.rjust(w) for cell, w in zip(one[1:], runs))]).rstrip() for one in zip(*cells)]
    notes = ["* the best", *_caveat(table)] if best is not None else []
    return lines + [part for note in notes for part in (textwrap.wrap(note, width) if width is not None else [note])]


def _caveat(table: list[dict[str, Any]]) -> list[str]:
    """What a difference of architectures here may come from instead; nothing where sizes are equal to 5%."""
    sizes = [row["parameters"] for row in table]
    if max(sizes) <= LIKE_SIZES * min(sizes) or len({row["architecture"] for row in table}) == 1:
        return []
    return [f"sizes differ by {max(sizes) / min(sizes) - 1:.0%}, so this does not tell architectures apart: `treadle compare --suite` trains them "
            "at equal size on equal data"]  # fmt: skip


def _cell(row: dict[str, Any], name: str, best: bool) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if name == "state_bytes":
        return f"{value / 1e3:,.0f} kB"
    if name.startswith("flops_per"):
        return f"{value / 1e6:,.2f} M"
    if name in row["shown"]:
        return format(value, row["shown"][name]["format"]) + (" *" if best else "")
    return f"{value:,}"
