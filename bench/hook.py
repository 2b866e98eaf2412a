"""What a step cost, for any trainer unmodified: torch calls this after every optimiser step."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


def watch(log: Path, **described: Any) -> None:
    """Writes one line with `described`, then one a step: wall and CPU seconds so far, page faults, peak memory."""
    stream = log.open("w", encoding="utf-8")
    stream.write(json.dumps(described) + "\n")

    def after_step(optimizer: Any, positional: Any, named: Any) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        row = {"wall": time.perf_counter(), "cpu": usage.ru_utime + usage.ru_stime, "faults": usage.ru_minflt,
               "peak_gb": usage.ru_maxrss * 1024 / 1e9}  # fmt: skip
        stream.write(json.dumps(row) + "\n")
        stream.flush()

    register_optimizer_step_post_hook(after_step)


def describe(log: Path, **described: Any) -> None:
    """Adds what is known only at the end (losses)."""
    with log.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"end": described}) + "\n")


def read(log: Path, skip: int = 3) -> dict[str, Any]:
    """Means over the steps after the first `skip`: CPU and wall seconds a step, faults a step, peak memory."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "wall" in line]
    found = {**lines[0], **next((line["end"] for line in lines if "end" in line), {})}
    first, last, count = steps[skip - 1], steps[-1], len(steps) - skip
    for name in ("wall", "cpu", "faults"):
        found[name] = (last[name] - first[name]) / count
    return {**found, "peak_gb": last["peak_gb"], "steps": len(steps)}
