"""What people see: a live line in a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from treadle.terminal import visible, write


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    seconds = int(max(0, seconds))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def rate(value: float) -> str:
    """A rate for people: 950, 1.2k, 3.45M."""
    return f"{value / 1e6:.2f}M" if value >= 1e6 else f"{value / 1e3:.1f}k" if value >= 1e3 else f"{value:.0f}"


WIDE = 130  # columns of a terminal that has room for a bar


def fitting(parts: list[str], width: int) -> str:
    """The parts that fit into so many columns, in their order: of those between the first (what was measured) and the last (how long is
    left), the later ones go first."""
    parts = list(parts)
    while len(parts) > 2 and len("  ".join(parts)) > width:
        del parts[-2]
    return "  ".join(parts)


class Console:
    """Messages, progress and warnings. quiet=True prints warnings only (library use, tests); silent=True not even those
    (all processes but the first)."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None, silent: bool = False) -> None:
        self.quiet, self.silent = quiet or silent, silent
        self.stream = stream or sys.stdout
        self.live = not self.quiet and self.stream.isatty()
        self._progress: Any = None
        self._task: Any = None

    def say(self, text: str = "") -> None:
        """A line for people; nothing when quiet."""
        if self.quiet:
            return
        if self._progress is not None:
            self._progress.console.print(visible(text), markup=False, highlight=False)
        else:
            write(text, self.stream)

    def warn(self, text: str) -> None:
        """Warnings go to the error stream, so that a piped output stays clean, and are not `quiet`."""
        if self.silent:
            return
        if self._progress is not None:
            self._progress.console.print(f"warning: {visible(text)}", markup=False, highlight=False, style="yellow")
        else:
            write(f"warning: {text}", sys.stderr)

    def start(self, done: int, total: int) -> None:
        """Opens the live line (in a terminal)."""
        if not self.live:
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        console = RichConsole(file=self.stream)
        bar = [BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%")] if console.width >= WIDE else []
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), *bar, TextColumn("{task.fields[detail]}"), console=console, refresh_per_second=4
        )
        self._task = self._progress.add_task("train", total=total, completed=done, detail="")
        self._progress.start()

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def row(self, row: dict[str, Any], measured: str, total: int, remaining: float, whole: str = "") -> None:
        """One logged step: into the live line, or a plain line. measured: what the task says of it; whole: the task's own line
        instead of ours, which then stays above the live one."""
        if self.quiet:
            return
        parts = [measured, f"lr {row['learning_rate']:.2e}", f"grad {row['grad_norm']:.2f}",
                  f"{rate(row['tokens_per_second'])} tok/s", f"{row['memory_gb']:.2f} GB"]  # fmt: skip
        if row.get("mfu") is not None:
            parts.append(f"mfu {row['mfu']:.0%}")
        parts.append(f"ETA {duration(remaining)}")
        if self._progress is not None:
            width = self._progress.console.width
            taken = 2 * len(f"{total}") + (37 if width >= WIDE else 7)  # "step 12/100", the bar, and the spaces between them
            self._progress.update(self._task, completed=row["step"], detail=fitting(parts, width - taken))
        if whole or self._progress is None:
            self.say(whole or f"step {row['step']}/{total}  {'  '.join(parts)}")

    def stop(self) -> None:
        """Closes the live line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
