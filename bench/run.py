"""`python -m bench`: limits, equality, then every contestant in the order A B C ... C B A, medians and ratios."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from bench import hook
from bench.task import Task

HERE = Path(__file__).parent
# name -> (module, precision, package it needs)
CONTESTANTS: dict[str, tuple[str, str, str | None]] = {
    "ours auto": ("bench.peers.ours", "auto", None),
    "bare auto": ("bench.peers.bare", "auto", None),
    "ours fp32": ("bench.peers.ours", "fp32", None),
    "plain fp32": ("bench.peers.plain", "fp32", None),
    "huggingface fp32": ("bench.peers.huggingface", "fp32", "accelerate"),
    "huggingface bf16": ("bench.peers.huggingface", "bf16", "accelerate"),
}


def one_run(name: str, steps: int) -> dict[str, Any]:
    """One contestant in a process of its own."""
    module, precision, _ = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps.jsonl"
        line = [sys.executable, "-m", module, "--steps", str(steps), "--log", str(log), "--precision", precision]
        done = subprocess.run(line, cwd=HERE.parent, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
        return hook.read(log)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of few steps: for correctness, not for figures")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=Task.steps)
    parser.add_argument("--only", nargs="*", help="some contestants by name")
    given = parser.parse_args()
    steps, rounds = (5, 1) if given.quick else (given.steps, given.rounds)
    task = Task()

    from bench.equal import later_loss, problems, remarks, same_weights_same_loss
    from bench.limits import limits, step_gflop

    peak = limits(task)
    difference = same_weights_same_loss(task)
    print(f"limits: fp32 {peak['fp32_gflops']:.0f}, bf16 {peak['bf16_gflops']:.0f} GFLOP/s")
    print(f"same weights, same loss: relative difference {difference:.1e}")
    assert difference < 1e-5, "our model and the plain one compute different losses"
    names = [n for n in CONTESTANTS if not given.only or n in given.only]
    for name in [n for n in names if CONTESTANTS[n][2] and importlib.util.find_spec(str(CONTESTANTS[n][2])) is None]:
        print(f"{name}: skipped, {CONTESTANTS[name][2]} is not installed (pip install -e '.[bench]')")
        names.remove(name)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in [*names, *reversed(names)]:
            found[name].append(one_run(name, steps))
            last = found[name][-1]
            print(f"{name:<18} {task.tokens_per_step / last['cpu']:8.0f} tokens per CPU-second, "
                  f"{last['wall'] * 1e3:6.0f} ms a step, peak {last['peak_gb']:.2f} GB", flush=True)  # fmt: skip
    latest = {name: runs[-1] for name, runs in found.items()}
    for name, one in latest.items():
        print(f"{name:<18} loss {one['losses'][0]:.3f} -> {later_loss(one['losses']):.3f} (median of the second half)")
    for remark in remarks(latest):
        print(f"remark: {remark}; a change of sign that GPT-2's start brings (bench/README.md)")
    unfair = problems(latest)
    for problem in unfair:
        print(f"NOT COMPARABLE: {problem}")
    report(task, found, peak, step_gflop, difference, unfair, write=not given.quick)


def report(
    task: Task, found: dict, peak: dict, step_gflop: Any, difference: float, unfair: list[str], write: bool
) -> None:
    """Medians, ratios of neighbouring runs, goals; a JSON with the machine."""
    speed = {name: [task.tokens_per_step / run["cpu"] for run in runs] for name, runs in found.items()}
    print("\nmedians")
    for name, runs in found.items():
        wall = statistics.median(run["wall"] for run in runs)
        limit = peak["bf16_gflops" if runs[0]["precision"] == "bf16" else "fp32_gflops"]
        share = step_gflop(task, runs[0]["parameters"]) / wall / limit
        print(f"{name:<18} {statistics.median(speed[name]):8.0f} tokens per CPU-second ({runs[0]['precision']}), "
              f"{share:.0%} of the measured peak")  # fmt: skip
    goals = []
    for goal in tomllib.loads((HERE / "goals.toml").read_text())["goal"]:
        if goal["numerator"] in speed and goal["denominator"] in speed:
            pairs = [a / b for a, b in zip(speed[goal["numerator"]], speed[goal["denominator"]])]
            ratio = statistics.median(pairs)
            verdict = "reached" if ratio >= goal["at_least"] else "MISSED"
            print(
                f"{goal['name']}: {ratio:.2f} ({min(pairs):.2f} to {max(pairs):.2f}), goal {goal['at_least']}: {verdict}"
            )
            goals.append({**goal, "ratio": ratio, "pairs": pairs})
    if write:
        import torch

        machine = {"processor": platform.machine(), "python": platform.python_version(), "cores": os.cpu_count(), "torch": torch.__version__,
                   "capability": torch.backends.cpu.get_cpu_capability(), "load": os.getloadavg()}  # fmt: skip
        path = HERE / "results" / f"cpu-{time.strftime('%Y%m%d')}.json"
        path.parent.mkdir(exist_ok=True)
        table = {"machine": machine, "limits": peak, "same_loss_difference": difference, "not_comparable": unfair,
                 "tokens_per_cpu_second": speed, "goals": goals}  # fmt: skip
        path.write_text(json.dumps(table, indent=1) + "\n")
        print(f"written to {path.relative_to(HERE.parent)}")
