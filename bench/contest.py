"""Trainers on one task, in processes of their own, in the order A B C ... C B A: tokens per CPU-second, start, memory.

    python -m bench.contest [--quick] [--only "ours auto" "plain fp32"]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import hook
from bench.peers import environment
from bench.task import Task

HERE = Path(__file__).parent
# name -> (module, precision, package it needs)
CONTESTANTS: dict[str, tuple[str, str, str | None]] = {
    "ours auto": ("bench.peers.ours", "auto", None),
    "bare auto": ("bench.peers.bare", "auto", None),
    "ours bf16": ("bench.peers.ours", "bf16", None),
    "ours fp32": ("bench.peers.ours", "fp32", None),
    "plain fp32": ("bench.peers.plain", "fp32", None),
    "huggingface fp32": ("bench.peers.huggingface", "fp32", "accelerate"),
    "huggingface bf16": ("bench.peers.huggingface", "bf16", "accelerate"),
    "litgpt fp32": ("bench.peers.litgpt", "fp32", "litgpt"),
}
QUICK = Task(rows=4, steps=5)


def one_run(name: str, task: Task, skip: int = 3) -> dict[str, Any]:
    """One contestant in a process of its own. RuntimeError with the end of what it printed when it fails."""
    module, precision, package = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps.jsonl"
        interpreter = environment.python() if package else sys.executable
        line = [interpreter, "-m", module, "--log", str(log), "--precision", precision, "--task", task.as_json()]
        begun = time.perf_counter()
        done = subprocess.run(line, cwd=HERE.parent, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
        return hook.read(log, skip, begun)


def turns(names: list[str], task: Task, rounds: int, quick: bool) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """name -> its runs, and name -> why it was skipped."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    skipped = {}
    for name in names:
        package = CONTESTANTS[name][2]
        if package and environment.version(package) is None:
            skipped[name] = environment.missing(package)
    for _ in range(rounds):
        for name in names if quick else [*names, *reversed(names)]:
            if name in skipped:
                continue
            try:
                found[name].append(one_run(name, task))
            except RuntimeError as problem:
                if name.startswith(("ours", "bare", "plain")):
                    raise
                skipped[name] = f"skipped ({str(problem).splitlines()[-1][:150]})"
                continue
            last = found[name][-1]
            print(f"  {name:<18} {task.tokens_per_step / last['cpu']:8.0f} tokens per CPU-second, {last['wall'] * 1e3:6.0f} ms a step, "
                  f"peak {last['peak_gb']:.2f} GB, first step after {last['first_step_cpu']:.1f} CPU s", flush=True)  # fmt: skip
    return {name: runs for name, runs in found.items() if runs and name not in skipped}, skipped


def ratio(found: dict[str, list[dict[str, Any]]], first: str, second: str, key: str = "cpu") -> list[float]:
    """`key` of the second over that of the first, of neighbouring runs: above 1 where the first needs less."""
    return [b[key] / a[key] for a, b in zip(found[first], found[second])]


# result -> (ours, the other, what is compared; the other's over ours)
SPEEDS = {
    "auto over plain fp32": ("ours auto", "plain fp32"), "auto over HF fp32": ("ours auto", "huggingface fp32"),
    "auto over HF bf16": ("ours auto", "huggingface bf16"), "auto over litgpt fp32": ("ours auto", "litgpt fp32"),
    "bf16 over HF bf16": ("ours bf16", "huggingface bf16"), "fp32 over plain fp32": ("ours fp32", "plain fp32"),
    "fp32 over HF fp32": ("ours fp32", "huggingface fp32"), "trainer over bare loop": ("ours auto", "bare auto"),
}  # fmt: skip


def measure(quick: bool, only: list[str] | None = None, rounds: int = 2, steps: int = Task.steps) -> dict[str, Any]:
    from bench.equal import later_loss, problems, remarks, same_weights_same_loss
    from bench.limits import limits, step_gflop

    task = QUICK if quick else replace(Task(), steps=steps)
    peak = limits(task)
    difference = same_weights_same_loss(task)
    values: dict[str, Any] = {"limits: fp32 GFLOP per CPU-second": peak["fp32_gflops"],
                              "limits: bf16 GFLOP per CPU-second": peak["bf16_gflops"],
                              "limits: GB copied per CPU-second": peak["copy_gb"], "same weights, loss differs by": difference}  # fmt: skip
    print(f"  limits: fp32 {peak['fp32_gflops']:.0f}, bf16 {peak['bf16_gflops']:.0f} GFLOP per CPU-second, copying {peak['copy_gb']:.1f} GB")
    print(f"  same weights, same loss: relative difference {difference:.1e}")
    assert difference < 1e-5, "our model and the plain one compute different losses"
    names = [name for name in CONTESTANTS if (name in only if only else not (quick and name == "ours bf16"))]
    found, skipped = turns(names, task, 1 if quick else rounds, quick)
    latest = {name: runs[-1] for name, runs in found.items()}
    for name, one in latest.items():
        print(f"  {name:<18} loss {one['losses'][0]:.3f} -> {later_loss(one['losses']):.3f} (median of the second half)")
    for remark in remarks(latest):
        print(f"  remark: {remark}; a change of sign that GPT-2's start brings (bench/README.md)")
    for problem in problems(latest):
        print(f"  NOT COMPARABLE: {problem}")
        values[f"not comparable: {problem}"] = 1.0
    for name, runs in found.items():
        cpu = statistics.median(run["cpu"] for run in runs)
        values[f"{name}: tokens per CPU-second"] = task.tokens_per_step / cpu
        values[f"{name}: peak GB"] = statistics.median(run["peak_gb"] for run in runs)
        values[f"{name}: CPU seconds to the first step"] = statistics.median(run["first_step_cpu"] for run in runs)
        limit = peak["bf16_gflops" if runs[0]["precision"] == "bf16" else "fp32_gflops"]
        values[f"{name}: share of peak"] = step_gflop(task, runs[0]["parameters"]) / cpu / limit
    values |= {f"{name}: tokens per CPU-second": why for name, why in skipped.items()}
    for name, (ours, other) in SPEEDS.items():
        values[name] = compared(found, skipped, ours, other, "cpu")
    start, memory = "first_step_cpu", "peak_gb"
    values["start of HF Trainer fp32 over ours"] = compared(found, skipped, "ours auto", "huggingface fp32", start)
    values["start of the plain loop over ours"] = compared(found, skipped, "ours auto", "plain fp32", start)
    values["memory of HF fp32 over ours"] = compared(found, skipped, "ours auto", "huggingface fp32", memory)
    values["memory of the plain loop over ours"] = compared(found, skipped, "ours auto", "plain fp32", memory)
    return values


def compared(found: dict[str, Any], skipped: dict[str, str], ours: str, other: str, key: str) -> float | str:
    """The median ratio of neighbouring runs, or why there is none."""
    for name in (ours, other):
        if name not in found:
            return skipped.get(name, "skipped (not among --only)")
    pairs = ratio(found, ours, other, key)
    return statistics.median(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.contest", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of few small steps: for correctness, not for figures")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=Task.steps)
    parser.add_argument("--only", nargs="*", help="some contestants by name")
    given = parser.parse_args()
    for name, value in measure(given.quick, given.only, given.rounds, given.steps).items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.3g')}")


if __name__ == "__main__":
    main()
