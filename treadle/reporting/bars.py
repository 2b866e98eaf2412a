"""A picture of a table: horizontal bars with the range of their runs, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

ROW, BAR, LABEL_LETTER, WIDTH = 24, 14, 7.2, 360  # pixels


def svg_bars(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """rows: (label, mean, lowest, highest), drawn from the top. The axis begins below the lowest of all, as its ends say, so
    that differences between good runs can be seen."""
    low, high = min(row[2] for row in rows), max(row[3] for row in rows)
    start = low - 0.05 * ((high - low) or abs(low) or 1.0)
    span = (high - start) or 1.0
    left = round(max(len(row[0]) for row in rows) * LABEL_LETTER) + 16
    height = ROW * (len(rows) + 2) + 8

    def x(value: float) -> float:
        return left + WIDTH * (value - start) / span

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + WIDTH + 80}" height="{height}" font-family="monospace" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="16" font-weight="bold">{escape(title)}</text>',
    ]
    for index, (label, mean, lowest, highest) in enumerate(rows):
        middle = ROW * (index + 1) + ROW / 2 + 4
        parts += [
            f'<text x="8" y="{middle + 4:g}">{escape(label)}</text>',
            f'<rect x="{left}" y="{middle - BAR / 2:g}" width="{x(mean) - left:.1f}" height="{BAR}" fill="#7aa6c2"/>',
            f'<line x1="{x(lowest):.1f}" x2="{x(highest):.1f}" y1="{middle:g}" y2="{middle:g}" stroke="black"/>',
            f'<text x="{x(highest) + 6:.1f}" y="{middle + 4:g}">{mean:.4f}</text>',
        ]
    seeds = "; the line is the range over seeds" if any(row[2] != row[3] for row in rows) else ""
    parts.append(f'<text x="{left}" y="{height - 8}" fill="gray">{start:.4g} to {high:.4g}{seeds}</text></svg>')
    return "\n".join(parts) + "\n"
