"""The picture of a suite: quality beside cost, and curves over sizes where there are several. One SVG, legible on light and dark."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from treadle.suite.table import short_bytes

ROW, LETTER, PANEL, GAP, TOP = 26, 7.2, 240, 26, 58  # pixels
COLOURS = ("#0b6bcb", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0e7490", "#a16207", "#be185d", "#4d7c0f", "#1e40af")
PANELS = ("step_time_ratio", "state_8k", "associative_recall")  # beside the metric, those that there are


def picture_of(result: dict[str, Any]) -> str | None:
    """None where nothing has finished."""
    metric = result["metric"]
    rows = [row for row in result["rows"] if metric in row["cells"]]
    if not rows:
        return None
    several = len({row["size"] for row in rows}) > 1
    names = [f"{row['label']} {row['size']:,}" if row["size"] is not None else row["label"] for row in rows]
    left = round(max(map(len, names)) * LETTER) + 24
    columns = {column["key"]: column for column in result["columns"]}
    keys = [metric, *(key for key in PANELS if any(key in row["cells"] for row in rows))]
    body = ROW * len(rows)
    curves = 320 if several else 0
    width, height = left + len(keys) * (PANEL + GAP) + 10, TOP + body + 30 + curves
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
             'font-family="system-ui, sans-serif" font-size="12" role="img">', f"<title>{escape(result['name'])}</title>",
             '<rect width="100%" height="100%" rx="6" fill="#ffffff"/>',
             f'<text x="12" y="22" font-weight="bold" font-size="14" fill="#111827">{escape(result["name"])}: {escape(_budget(result))}</text>']  # fmt: skip
    for number, name in enumerate(names):
        y = TOP + ROW * number + ROW / 2 + 4
        parts.append(f'<text x="12" y="{y:g}" fill="#111827">{escape(name)}</text>')
    for number, key in enumerate(keys):
        parts += _panel(rows, columns[key], key == metric, left + number * (PANEL + GAP))
    if several:
        parts += _curves(result, TOP + body + 50, width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _budget(result: dict[str, Any]) -> str:
    unit, amount = next(iter(result["budget"].items()))
    return f"{amount:,.0f} {unit.replace('_', ' ')} a run, {result['budget']['seeds']} seed(s)"


def _panel(rows: list[dict[str, Any]], column: dict[str, Any], points: bool, left: int) -> list[str]:
    """The metric as a point with the range of its seeds, on an axis that shows differences; anything else as bars from 0 (of what
    spans more than a factor of 30, the logarithm)."""
    cells = [row["cells"].get(column["key"]) for row in rows]
    there = [cell for cell in cells if cell is not None]
    low, high = min(cell["low"] for cell in there), max(cell["high"] for cell in there)
    logarithm = not points and low > 0 and high / low > 30
    start = low - 0.08 * ((high - low) or 1.0) if points else (math.log(low) - 0.5 if logarithm else 0.0)
    end = math.log(high) if logarithm else high
    room = PANEL - 62

    def x(value: float) -> float:
        return left + room * ((math.log(value) if logarithm else value) - start) / ((end - start) or 1.0)

    better = "\u2193" if column["lower_is_better"] else "\u2191"  # an arrow to where it is better
    unit = f", {column['unit']}" if column["unit"] and not column["key"].startswith("state") else ""
    parts = [f'<text x="{left}" y="44" fill="#374151">{escape(column["title"] + unit)} {better}</text>']
    best = (min if column["lower_is_better"] else max)(cell["mean"] for cell in there)
    for number, cell in enumerate(cells):
        middle = TOP + ROW * number + ROW / 2
        if cell is None:
            parts.append(f'<text x="{left}" y="{middle + 4:g}" fill="#6b7280">none</text>')
            continue
        colour = "#0b6bcb" if cell["mean"] == best else "#8fb3d9"
        if points:
            parts += [f'<line x1="{left}" x2="{left + room}" y1="{middle:g}" y2="{middle:g}" stroke="#e5e7eb"/>',
                      f'<line x1="{x(cell["low"]):.1f}" x2="{x(cell["high"]):.1f}" y1="{middle:g}" y2="{middle:g}" stroke="{colour}" '
                      'stroke-width="3"/>', f'<circle cx="{x(cell["mean"]):.1f}" cy="{middle:g}" r="5" fill="{colour}"/>']  # fmt: skip
        else:
            parts.append(f'<rect x="{left}" y="{middle - 7:g}" width="{max(1.0, x(cell["mean"]) - left):.1f}" height="14" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{left + room + 8}" y="{middle + 4:g}" fill="#111827">{_short(cell["mean"], column["key"])}</text>')
    return parts


def _short(value: float, key: str) -> str:
    if key.startswith("state"):
        return short_bytes(value)
    return f"{value:.3f}" if key not in ("step_time_ratio", "associative_recall") else f"{value:.2f}"


def _curves(result: dict[str, Any], top: int, width: int) -> list[str]:
    """Value against parameters, both as logarithms, one line an entry."""
    points = [point for curve in result["scaling"] for point in curve["points"]]
    xs, ys = [math.log(p["parameters"]) for p in points], [math.log(p["value"]) for p in points if p["value"] > 0]
    if not points or len(ys) < len(points):
        return []
    left, right, bottom = 70, width - 210, top + 220

    def x(value: float) -> float:
        return left + (right - left) * (math.log(value) - min(xs)) / ((max(xs) - min(xs)) or 1.0)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (math.log(value) - min(ys)) / ((max(ys) - min(ys)) or 1.0)

    parts = [f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="#d1d5db"/>',
             f'<text x="{left}" y="{bottom + 34}" fill="#374151">parameters (logarithmic)</text>']  # fmt: skip
    for value in sorted({p["parameters"] for p in result["scaling"][0]["points"]}):
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#374151">{value:,}</text>')
    for value in (math.exp(min(ys)), math.exp(max(ys))):
        parts.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end" fill="#374151">{value:.3f}</text>')
    for number, curve in enumerate(result["scaling"]):
        colour = COLOURS[number % len(COLOURS)]
        places = [(x(p["parameters"]), y(p["value"])) for p in curve["points"]]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in places]
        law = curve["fit"]
        said = f"{curve['label']}" + ("" if law is None else f": N^-{law['exponent']:.3f}")
        parts.append(f'<text x="{right + 14}" y="{top + 14 + 18 * number}" fill="{colour}">{escape(said)}</text>')
    return parts
