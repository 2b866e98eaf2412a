"""What a step cost, for any trainer unmodified: torch calls this after every optimiser step."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any


def watch(log: Path, **described: Any) -> None:
    """Writes one line with `described`, then one a step: wall and CPU seconds so far, page faults, peak memory."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    stream = log.open("w", encoding="utf-8")
    stream.write(json.dumps(described) + "\n")

    def after_step(optimizer: Any, positional: Any, named: Any) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        row = {"wall": time.perf_counter(), "cpu": usage.ru_utime + usage.ru_stime, "faults": usage.ru_minflt,
               "peak_gb": peak_gigabytes()}  # fmt: skip
        stream.write(json.dumps(row) + "\n")
        stream.flush()

    register_optimizer_step_post_hook(after_step)


def peak_gigabytes() -> float:
    """Most resident memory of this process so far. getrusage would also count its parent's, from before the exec."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def describe(log: Path, **described: Any) -> None:
    """Adds what is known only at the end (losses)."""
    with log.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"end": described}) + "\n")


def read(log: Path, skip: int = 3, begun: float | None = None) -> dict[str, Any]:
    """Means over the steps after the first `skip`: CPU and wall seconds a step, faults a step, peak memory; and the CPU seconds from the
    start of the process to the end of its first step, with `begun` (time.perf_counter of whoever started it) the wall seconds too.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "wall" in line]
    found = {**lines[0], **next((line["end"] for line in lines if "end" in line), {})}
    first, last, count = steps[skip - 1], steps[-1], len(steps) - skip
    for name in ("wall", "cpu", "faults"):
        found[name] = (last[name] - first[name]) / count
    found["first_step_cpu"] = steps[0]["cpu"]
    if begun is not None:
        found["first_step_wall"] = steps[0]["wall"] - begun
    return {**found, "peak_gb": last["peak_gb"], "steps": len(steps)}
