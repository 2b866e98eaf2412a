"""Peak memory of a training process beside Hugging Face's Trainer and the plain loop: 10.8M parameters, and a vocabulary of 32k.

    python -m bench.memory [--quick]

In two halves: gradient_accumulation_steps = 2 over 8 rows each, which holds half of the activations.

VmHWM of a process that takes a few steps: weights, gradients, optimiser, activations, and the interpreter with torch (.25 to .36 GB).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench import contest
from bench.peers import environment
from bench.task import Task

NAMES = ("ours auto", "ours fp32", "plain fp32", "huggingface fp32", "huggingface bf16")
IMPORTED = "import torch; from bench.hook import peak_gigabytes; print(peak_gigabytes())"


def peaks(task: Task, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """name -> GB, or why it was skipped."""
    found: dict[str, Any] = {}
    for name in names:
        package = contest.CONTESTANTS[name][2]
        if package and environment.version(package) is None:
            found[name] = environment.missing(package)
            continue
        found[name] = contest.one_run(name, task, skip=1)["peak_gb"]
        print(f"  {name:<18} vocabulary {task.vocabulary}, peak {found[name]:.2f} GB", flush=True)
    return found


def over(found: dict[str, Any], other: str, ours: str) -> float | str:
    """What the other takes over what ours takes."""
    return found[other] if isinstance(found[other], str) else found[other] / found[ours]


def measure(quick: bool) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=contest.HERE.parent, capture_output=True, text=True, check=True)
    values: dict[str, Any] = {"interpreter with torch: GB": float(done.stdout)}
    usual = Task(steps=3)
    if not quick:
        found = peaks(usual)
        halves = contest.one_run("ours auto", replace(usual, accumulation=2, steps=5))
        whole = contest.one_run("ours auto", replace(usual, steps=5))
        values |= {f"10.8M parameters, {name}: GB": value for name, value in found.items()}
        values["10.8M parameters, ours auto in two halves: GB"] = halves["peak_gb"]
        values["10.8M parameters, CPU time of two halves over one whole"] = halves["cpu"] / whole["cpu"]
        values["10.8M parameters, HF fp32 over ours auto"] = over(found, "huggingface fp32", "ours auto")
        values["10.8M parameters, HF fp32 over ours fp32"] = over(found, "huggingface fp32", "ours fp32")
    wide = replace(usual, vocabulary=32768, rows=2 if quick else 16, layers=1 if quick else 6)
    found = peaks(wide, ("ours fp32", "plain fp32") if quick else NAMES)  # one pair is enough to see that it works
    values |= {f"vocabulary of 32k, {name}: GB": value for name, value in found.items()}
    values["vocabulary of 32k, plain fp32 over ours fp32"] = over(found, "plain fp32", "ours fp32")
    if not quick:
        values["vocabulary of 32k, plain fp32 over ours auto"] = over(found, "plain fp32", "ours auto")
        values["vocabulary of 32k, HF fp32 over ours auto"] = over(found, "huggingface fp32", "ours auto")
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    for name, value in measure(parser.parse_args().quick).items():
        print(f"{name}: {value if isinstance(value, str) else format(value, '.3g')}")


if __name__ == "__main__":
    main()
