"""Pictures of a trajectory and of a certificate: as text as wide as the terminal, and as a file with matplotlib."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.collatz.arithmetic import COLLATZ, spelled
from treadle.collatz.certificates import read
from treadle.collatz.ledger import Ledger
from treadle.collatz.progress import rounded
from treadle.errors import ConfigError, MissingExtra

ROWS = 16
FORMATS = (".png", ".pdf", ".svg")
MOST_STEPS = 5_000_000


@dataclass(frozen=True)
class Series:
    """Values over their places 0, 1, 2, ..."""

    title: str
    horizontal: str
    vertical: str
    values: list[float]


def trajectory_heights(n: int) -> Series:
    """log2 of n and of all that follows it down to 1, standard steps. ConfigError for n < 1."""
    if n < 1:
        raise ConfigError(f"trajectories to 1 begin at a positive integer, not {n}")
    title, heights, top = spelled(n) if n < 1 << 200 else f"a number of {n.bit_length():,} bits", [math.log2(n)], n
    while n != 1:
        if len(heights) > MOST_STEPS:
            raise ConfigError(f"{title} has not come to 1 after {MOST_STEPS:,} steps; that is too long to plot")
        n = COLLATZ.step(n)
        top = max(top, n)
        heights.append(math.log2(n))
    highest = f"{top:,}" if top < 1 << 100 else f"2^{math.log2(top):.2f}"
    return Series(f"{title}: {len(heights) - 1:,} steps to 1, at most {highest}", "steps", "log2", heights)


def certificate_series(path: str | Path) -> list[Series]:
    """Of the proved blocks of a certificate, ascending: numbers a second of work, and log2 of the largest number met."""
    pieces = [piece for piece in Ledger([read(path)]).proved if piece.bits is not None]
    if not pieces:
        raise ConfigError(f"{path}: no block is finished, so there is nothing to plot; go on with treadle collatz verify")
    where = f"blocks from {spelled(pieces[0].start)} to {spelled(pieces[-1].end)}"
    rates = [piece.count / piece.seconds if piece.seconds > 0 else math.nan for piece in pieces]
    heights = [math.log2(piece.totals.maximum) if piece.totals.maximum else math.nan for piece in pieces]
    found = [Series(f"{where}: numbers a second of work", "block", "n/s", rates),
             Series(f"{where}: largest number met", "block", "log2", heights)]  # fmt: skip
    return [series for series in found if not all(math.isnan(value) for value in series.values)]


def text_plot(series: Series, width: int | None = None, rows: int = ROWS) -> list[str]:
    """Lines of at most `width` characters (default: the terminal's); a column spans all values that fall into it."""
    width = max(30, width or shutil.get_terminal_size((80, 24)).columns)
    known = [value for value in series.values if not math.isnan(value)]
    low, high = min(known), max(known)
    room = (high - low) or 1.0
    decimals = min(6, max(1, math.ceil(-math.log10(room / (rows - 1)))))  # neighbouring lines read differently
    labels = [_label(high - room * row / (rows - 1), decimals) for row in range(rows)]
    margin = max(len(label) for label in labels) + 2
    columns = max(1, min(width - margin, len(series.values)))
    stretch = max(1, (width - margin) // len(series.values))
    grid = [[" "] * (columns * stretch) for _ in range(rows)]
    for column in range(columns):
        part = series.values[column * len(series.values) // columns : (column + 1) * len(series.values) // columns]
        part = [value for value in part if not math.isnan(value)]
        if part:
            top, bottom = (round((high - value) / room * (rows - 1)) for value in (max(part), min(part)))
            for row in range(top, bottom + 1):
                for at in range(column * stretch, (column + 1) * stretch):
                    grid[row][at] = "*"
    lines = [series.title[:width]]
    lines += [f"{label:>{margin - 2}} |{''.join(cells)}".rstrip() for label, cells in zip(labels, grid, strict=True)]
    last = f"{len(series.values) - 1:,}"
    scale = f"0 {series.horizontal}"
    lines.append(f"{series.vertical:>{margin - 2}} +{'-' * (columns * stretch)}")
    lines.append(" " * margin + scale + last.rjust(max(len(last) + 1, columns * stretch - len(scale))))
    return lines


def _label(value: float, decimals: int) -> str:
    return rounded(value) if abs(value) >= 10_000 else f"{value:.{decimals}f}"


def write_picture(all_series: Sequence[Series], output: str | Path) -> None:
    """One panel for each series, as .png, .pdf or .svg. MissingExtra without matplotlib."""
    output = Path(output)
    if output.suffix.lower() not in FORMATS:
        raise ConfigError(f"--output {output}: a picture is a {', '.join(FORMATS)} file, as in --output plot.png")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("a picture in a file", "collatz")
    from matplotlib.figure import Figure  # without pyplot: no window system is looked for

    output.parent.mkdir(parents=True, exist_ok=True)
    figure: Any = Figure(figsize=(10, 4 * len(all_series)), layout="constrained")
    for number, series in enumerate(all_series, 1):
        axes = figure.add_subplot(len(all_series), 1, number)
        axes.plot(series.values, linewidth=0.8, marker="." if len(series.values) < 50 else "")
        axes.set(title=series.title, xlabel=series.horizontal, ylabel=series.vertical)
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=150)
