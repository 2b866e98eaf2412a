"""Why a small H-Net is behind a dense transformer of its FLOPs: other mixers, rates and chunks, at equal bytes seen.

    python -m bench.hierarchy [austen] [--steps 600] [--seeds 1] [--only NAME ...] [--processes 2] [--output runs/hierarchy]

The base is the H-Net of bench/quality.py; every cell is an ordinary run of the command line on one thread, evaluated on all of its
held-out text, so an interrupted table continues. FLOPs are those of a byte's forward pass.
"""

from __future__ import annotations

import argparse
import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import treadle
from bench.quality import LENGTH, MODELS, ROWS, trained
from treadle.distributed.pool import folder_name

HNET = MODELS["hnet"][1]
ATTENTION = {"ternary": False, "token_mixers": ["attention", "attention"]}
# name -> (architecture, keys, learning rate)
VARIANTS: dict[str, tuple[str, dict[str, object], float]] = {
    "dense, FLOPs of hnet": MODELS["dense, FLOPs of hnet"],
    "hnet": MODELS["hnet"],
    "no ternary weights": ("hnet", {**HNET, "ternary": False}, 8e-3),
    "no ternary weights, rate 4e-3": ("hnet", {**HNET, "ternary": False}, 4e-3),
    "attention inside": ("hnet", {**HNET, "ternary": False, "token_mixers": ["hgrn", "attention"]}, 4e-3),
    "attention in both": ("hnet", {**HNET, **ATTENTION}, 4e-3),
    "attention in both, 2.5 bytes a chunk": ("hnet", {**HNET, **ATTENTION, "target_ratios": [2.5]}, 4e-3),
    "ssm outside, attention inside": ("hnet", {**HNET, "ternary": False, "token_mixers": ["ssm", "attention"]}, 4e-3),
    "attention in both, router's rate 1": ("hnet", {**HNET, **ATTENTION, "router_learning_rate": 1.0}, 4e-3),
    "attention in both, one rate": ("hnet", {**HNET, **ATTENTION, "stage_learning_rates": False}, 4e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hierarchy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="austen")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/hierarchy"))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    def one(name: str, seed: int) -> float:
        folder = given.output / f"{Path(given.source).stem}-{given.steps}" / f"{folder_name(name)}-{seed}"
        found = trained(VARIANTS[name], given.source, seed, given.steps, folder)
        print(f"{name}, seed {seed}: {found:.4f} bits per byte", flush=True)
        return found

    cells = [(name, seed) for seed in range(given.seeds) for name in given.only]
    with ThreadPoolExecutor(given.processes) as pool:
        found = dict(zip(cells, pool.map(lambda of: one(*of), cells)))
    print(f"\n| {given.steps} steps of {ROWS} x {LENGTH} bytes, {given.seeds} seed(s) | parameters | FLOPs a byte | bits per byte |\n|---|---|---|---|")
    for name in given.only:
        arch, keys, _ = VARIANTS[name]
        model = treadle.build(arch, vocab_size=256, **keys)  # type: ignore[arg-type]
        values = [found[name, seed] for seed in range(given.seeds)]
        print(f"| {name} | {model.parameter_count():,} | {model.flops(LENGTH) / LENGTH / 1e6:.2f} M | {statistics.mean(values):.3f} "
              f"({max(values) - min(values):.3f}) |")  # fmt: skip


if __name__ == "__main__":
    main()
