"""`python -m bench`: every part of the bench, its goals, and a JSON with the machine and the versions.

    python -m bench [--quick] [--only contest memory] [--rounds 1 --steps 6]

A part is a module with `measure(quick) -> {name: number, or why it was skipped}`. What is missing (a peer, a GPU, a part) is skipped
with the reason and is never a win. `--quick` is for correctness: two minutes on two cores, and it never fails on a timing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import goals, machine
from bench.task import Task

HERE = Path(__file__).parent
# name -> (module, what it measures)
PARTS = {
    "contest": ("bench.contest", "training: tokens per CPU-second, start and memory beside other trainers"),
    "memory": ("bench.memory", "peak memory at a vocabulary of 32k and at 10.8M parameters"),
    "startup": ("bench.startup", "seconds to the first loss of the built-in recipe"),
    "packing": ("bench.packing", "gathering rows, and packing against padding"),
    "generate": ("bench.generate", "generation beside Hugging Face's generate"),
    "serving": ("bench.serving", "sixteen concurrent requests against one at a time"),
    "llama_cpp": ("bench.peers.llama_cpp", "decoding beside llama.cpp"),
    "kernels": ("bench.kernels", "fused kernels against their plain references"),
    "architectures": ("bench.architectures", "every architecture beside a dense model of equal size"),
    "scale": ("bench.scale", "longer rows, more parameters, a larger vocabulary"),
    "demo": ("bench.demo", "what the built-in recipe learns per CPU-second"),
    "collatz": ("bench.collatz", "the range verifier beside a plain C loop"),
    "gpu": ("bench.gpu", "the same questions on a GPU"),
}


def kernels(quick: bool) -> dict[str, Any]:
    """bench.kernels prints JSON: CPU time of torch's form over the compiled kernel's, by dtype and operation."""
    sizes = ["--shape", "2", "128", "128", "4", "2", "256", "--rounds", "2"] if quick else []
    done = subprocess.run([sys.executable, "-m", "bench.kernels", *sizes], cwd=HERE.parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    table = json.loads(done.stdout)["table"]
    return {f"{dtype}, {name}: torch over kernel": one["ratio"] for dtype, rows in table.items() for name, one in rows.items()}


ADAPTED = {"kernels": kernels}  # parts that print a table of their own


def measure_part(name: str, quick: bool, **options: Any) -> dict[str, Any]:
    """Numbers by name; a text instead of one says why there is none, and the name alone that the whole part was left out."""
    module = PARTS[name][0]
    if importlib.util.find_spec(module) is None:
        return {name: f"skipped ({module} is not there)"}
    try:
        found = getattr(importlib.import_module(module), "measure", ADAPTED.get(name))
        if found is None:
            return {name: f"skipped (python -m {module} prints its own table)"}
        return dict(found(quick, **options))
    except Exception as problem:  # one broken part must not hide the others
        return {name: f"FAILED ({type(problem).__name__}: {str(problem)[-300:]})"}


def as_text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and few: for correctness, not for figures")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="some parts")
    parser.add_argument("--rounds", type=int, default=2, help="of training, A B C ... C B A each")
    parser.add_argument("--steps", type=int, default=Task.steps, help="of training, each; the first three are not timed")
    parser.add_argument("--threads", type=int, default=1, help="of every process; CPU seconds also count threads that wait for others")
    parser.add_argument("--output", type=Path, help="the JSON to write or add to; default results/cpu-DATE.json, none with --quick")
    given = parser.parse_args()
    loaded, threads = machine.loaded(), given.threads
    os.environ["OMP_NUM_THREADS"], os.environ["BENCH_LOADED"] = str(threads), str(int(loaded))
    import torch

    from treadle.ops.memory import keep_freed_memory

    keep_freed_memory()  # as every training does; for the parts that time in this process
    torch.set_num_threads(threads)
    about = machine.describe()
    print(f"{about['processor']} ({about['kind']}), {about['cores']} cores, torch {about['torch']}, {threads} threads, load {about['load'][0]}; "
          f"the machine is {'loaded: CPU seconds count, wall time does not' if loaded else 'quiet'}")  # fmt: skip
    parts: dict[str, dict[str, Any]] = {}
    for name in given.only or PARTS:
        print(f"\n{name}: {PARTS[name][1]}", flush=True)
        begun = time.perf_counter()
        options = {"rounds": given.rounds, "steps": given.steps} if name == "contest" else {}
        parts[name] = measure_part(name, given.quick, **options)
        for what, value in parts[name].items():
            print(f"  {what}: {as_text(value)}")
        print(f"  ({time.perf_counter() - begun:.0f} s)", flush=True)
    path = given.output or (None if given.quick else HERE / "results" / f"cpu-{time.strftime('%Y%m%d')}.json")
    table = {"machine": about, "quick": given.quick, "parts": parts}
    if path is not None and path.exists() and given.only:  # some parts again: the others stay
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if "parts" in earlier:
            table["parts"] = {**earlier["parts"], **parts}
    values = goals.flat(table["parts"])
    values |= goals.of_a_gpu(HERE / "results")
    verdicts = goals.judge(values, about["kind"])
    print("\ngoals" + (" (figures of --quick are no measurement)" if given.quick else ""))
    for verdict in verdicts:
        if verdict.part in table["parts"] or verdict.value is not None:
            print(f"  {verdict.text()}")
    if path is not None:
        table["goals"] = [verdict.as_json() for verdict in verdicts]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")
    if any(str(value).startswith("FAILED") for part in parts.values() for value in part.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
