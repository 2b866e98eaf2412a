"""Bar charts as small SVG files that read well on light and dark pages."""

from __future__ import annotations

from html import escape
from pathlib import Path

LEFT, WIDTH, RIGHT, BAR, GAP, TOP = 230, 420, 90, 18, 8, 40
OURS, OTHERS, TEXT, LINE = "#2f6fde", "#9aa4b2", "#6b7280", "#d14343"


def bars(path: Path, title: str, rows: list[tuple[str, float]], mark: float | None = None, digits: int = 3) -> None:
    """One bar a row, longest in full width; names that begin with "ours" in colour. `mark`: a line at that value (a peer's 1.0, a goal)."""
    most = max([value for _, value in rows] + ([mark] if mark is not None else []))
    height = TOP + len(rows) * (BAR + GAP) + GAP
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" height="{height}" viewBox="0 0 {LEFT + WIDTH + RIGHT} {height}" '
             f'font-family="sans-serif" font-size="13" fill="{TEXT}" role="img">', f"<title>{escape(title)}</title>",
             f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>']  # fmt: skip
    for number, (name, value) in enumerate(rows):
        y = TOP + number * (BAR + GAP)
        length = max(1.0, value / most * WIDTH)
        text = f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"
        lines.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        lines.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="{OURS if name.startswith("ours") else OTHERS}"/>')
        lines.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + 14}">{text}</text>')
    if mark is not None:
        x = LEFT + mark / most * WIDTH
        lines.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{height - GAP}" stroke="{LINE}" stroke-dasharray="4 3"/>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</svg>"]) + "\n", encoding="utf-8")
