"""The table of a suite for people: text for a terminal, Markdown for a page."""

from __future__ import annotations

from typing import Any

GAP = "  "
FIRST = (0, 3, 4, 2, 1)  # the columns that stay longest in a narrow terminal: the entry, what is compared, its difference, rate, parameters


def lines_of(result: dict[str, Any], width: int | None = None, whole: str = "") -> list[str]:
    """The table, the first entry on top as in the suite, and below it what it cost and what it does not say. width: characters of the
    terminal's lines; columns that do not fit are left out, and a line says so and that the file `whole` has them."""
    heads = [head.removesuffix(")").split(" (") for head in _heads(result)]  # a unit stands below its title
    cells = [[head[0] for head in heads], [head[1] if len(head) > 1 else "" for head in heads], *(_row(result, row) for row in result["rows"])]
    widths = [max(len(line[number]) for line in cells) for number in range(len(cells[0]))]
    fit = _fitting(widths, width)
    lines = [GAP.join(line[number].rjust(widths[number]) if number else line[number].ljust(widths[number]) for number in fit).rstrip() for line in cells]
    lines = [line for line in lines if line]  # none of these columns may have a unit
    if len(fit) < len(widths):
        lines.append(f"{len(widths) - len(fit)} columns more are in {whole}: this terminal is too narrow for them")
    return [*lines, "", *notes(result)]


def _fitting(widths: list[int], width: int | None) -> list[int]:
    """The columns that lines of so many characters hold, in their order; the entry and what is compared in any."""
    kept: list[int] = []
    for number in [*FIRST, *range(len(FIRST), len(widths))]:
        needed = sum(widths[one] + len(GAP) for one in [*kept, number]) - len(GAP)
        if width is None or number in FIRST[:2] or needed <= width:
            kept.append(number)
    return sorted(kept)


def markdown_of(result: dict[str, Any]) -> str:
    heads = _heads(result)
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += ["| " + " | ".join(_row(result, row)) + " |" for row in result["rows"]]
    return "\n".join(lines) + "\n"


def notes(result: dict[str, Any]) -> list[str]:
    """Sentences that belong under the table."""
    cost, budget, seeds = result["cost"], result["budget"], result["budget"]["seeds"]
    unit, amount = next(iter(budget.items()))
    first = result["rows"][0]["label"]
    found = [f"{amount:,.0f} {unit.replace('_', ' ')} a run, {seeds} seed(s): mean and range; the difference is to {first}, seed by seed, "
             "with its 95% interval" + (" (none from one seed)" if seeds == 1 else ""),
             f"{cost['cpu_seconds']:,.0f} CPU seconds: {cost['of_search']:,.0f} to choose learning rates, {cost['of_runs']:,.0f} to train, "
             f"{cost['of_probes']:,.0f} for probes, {cost['of_measuring']:,.0f} to measure"]  # fmt: skip
    same = result["data"]["same_rows_in_the_same_order"]
    if same is not None:
        found.append("all saw the same rows in the same order" if same else
                     "not all saw the same rows: a tokenizer, row length or batch of its own; bytes are equal, rows are not")  # fmt: skip
    edge = [row["label"] for row in result["rows"] if row["learning_rate_at_edge"]]
    if edge:
        found.append(f"the best rate is at the edge of the grid for {', '.join(dict.fromkeys(edge))}: a wider grid may be better")
    for curve in result["scaling"]:
        law = curve["fit"]
        found.append(f"{curve['label']}: " + (f"no scaling law: {curve['refused']}" if law is None else
                     f"{result['metric']} = {law['factor']:.4g} N^-{law['exponent']:.4f} (95%: {law['low']:.4f} to {law['high']:.4f}) over "
                     f"{law['sizes']} sizes"))  # fmt: skip
    failed = [job for job in result["jobs"] if job["state"] == "failed"]
    return found + [f"failed: {job['label']}: {job['problem']}" for job in failed]


def short_bytes(count: float) -> str:
    """12_584_456 -> "12.6 MB"."""
    size, unit = next(((size, unit) for size, unit in ((1e6, "MB"), (1e3, "kB")) if count >= size), (1.0, "B"))
    return f"{count / size:.1f} {unit}" if size > 1 else f"{count:.0f} B"


def _heads(result: dict[str, Any]) -> list[str]:
    metric, *others = result["columns"]
    return ["", "parameters", "rate", metric["title"], "difference", *(_head(one) for one in others)]


def _head(column: dict[str, Any]) -> str:
    unit = "" if column["key"].startswith("state") else f" ({column['unit']})"
    return f"{column['title']}{unit}"


def _row(result: dict[str, Any], row: dict[str, Any]) -> list[str]:
    metric, *others = result["columns"]
    rate = "-" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
    values = [_cell(row["cells"].get(one["key"]), one["key"]) for one in others]
    return [row["label"], f"{row['parameters']:,}", rate, _spread(row["cells"].get(metric["key"])), _difference(row["paired"]), *values]


def _spread(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    text = f"{cell['mean']:.4f}"
    return text if len(cell["values"]) == 1 else f"{text} ({cell['low']:.4f} to {cell['high']:.4f})"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{found['difference']:+.4f}"
    return f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _cell(cell: dict[str, Any] | None, key: str) -> str:
    if cell is None:
        return "-"
    mean = cell["mean"]
    if key in ("step_time_ratio", "peak_memory_gb"):
        return f"{mean:.2f}"
    if key.startswith("state"):
        return short_bytes(mean)
    if key in ("copy", "associative_recall", "induction"):
        return f"{mean:.2f}"
    return f"{mean:,.0f}"
