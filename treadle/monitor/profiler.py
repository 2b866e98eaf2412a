"""`log.profile = START:STEPS`: a trace of some steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Profiler:
    """Records the asked steps and writes trace.json; does nothing when nothing is asked."""

    def __init__(self, asked: str | None, folder: Path) -> None:
        self.first, count = (int(part) for part in asked.split(":")) if asked else (0, 0)
        self.last, self.folder, self.inner = self.first + count - 1, folder, None

    inner: Any

    def before(self, step: int) -> None:
        """Begins the trace where this step is the first of those asked for."""
        if step == self.first and self.last >= self.first > 0:
            import torch.profiler

            self.inner = torch.profiler.profile()
            self.inner.__enter__()

    def after(self, step: int) -> None:
        """Ends it after the last and writes trace.json."""
        if self.inner is not None and step == self.last:
            self.inner.__exit__(None, None, None)
            self.inner.export_chrome_trace(str(self.folder / "trace.json"))
            self.inner = None
