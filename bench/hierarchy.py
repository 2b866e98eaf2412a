"""Why a small H-Net was behind a dense transformer of its FLOPs: changes one after the other, at equal bytes seen.

    python -m bench.hierarchy [--texts austen python] [--steps 600] [--seeds 3] [--only NAME ...] [--processes 2] [--output runs/hierarchy]

Each H-Net keeps the changes of those before it (VARIANTS has all), at the better of the learning rates 4e-3 and 8e-3 (novels,
one seed; of the dense model 4e-3, 8e-3 and 1.6e-2). NorMuon, constant rate and then linear decay over the second half. Every cell is an
ordinary run of the command line on one thread, evaluated on all of its held-out text, so an interrupted table continues. FLOPs are
those of a byte's forward pass with as many chunks as the ratio loss aims at.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import treadle
from bench.quality import HIERARCHY, LENGTH, MODELS, ROWS, grid, shown, trained
from bench.texts import file_of
from treadle.distributed.pool import folder_name

FULL = {**HIERARCHY, "ternary": False}
CONVOLUTION = {**FULL, "convolution_size": 4}
NARROW = {**CONVOLUTION, "hidden_ratio": 1, "num_blocks": [[2, 0, 2], [8]]}
ATTENTION = {**NARROW, "num_blocks": [[2, 0, 2], [6]], "token_mixers": [["hgrn", "hgrn", "attention", "hgrn"], "hgrn"],
             "local_window": 128, "router_learning_rate": 1.0}  # fmt: skip
# name -> (architecture, keys, learning rate)
VARIANTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "dense": (*MODELS["dense, FLOPs of hnet"][:2], 8e-3),
    "hnet": ("hnet", HIERARCHY, 8e-3),
    "no ternary weights": ("hnet", FULL, 4e-3),
    "convolution of 4 bytes": ("hnet", CONVOLUTION, 4e-3),
    "twice the blocks, each with a quarter of the MLP": ("hnet", NARROW, 4e-3),
    "attention over 128 bytes in the decoder": ("hnet", ATTENTION, 8e-3),
}
OPTIMIZER = {"optim.name": "normuon", "lr_scheduler_type": "wsd", "decay_fraction": 0.5, "min_lr_ratio": 0.02, "weight_decay": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hierarchy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", default=["austen", "python"], help="names of bench/texts.py, or paths")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/hierarchy"))
    given = parser.parse_args()
    texts = {Path(text).stem: file_of(text, given.output) for text in given.texts}
    if len(texts) < len(given.texts):
        parser.error("two of the texts have one name; rename a file")

    def one(name: str, text: str, seed: int) -> float:
        arch, keys, rate = VARIANTS[name]
        folder = given.output / str(given.steps) / f"{text}-{folder_name(name)}-{seed}"
        found = trained((arch, {**OPTIMIZER, **keys}, rate), str(texts[text]), seed, given.steps, folder)
        print(f"{text}, {name}, seed {seed}: {found:.4f} bits per byte", flush=True)
        return found

    found = grid(given.only, texts, given.seeds, given.processes, one)
    print(f"\n{given.steps} steps of {ROWS} x {LENGTH} bytes; mean over {given.seeds} seed(s) (largest - smallest)")
    print("| | parameters | FLOPs a byte | " + " | ".join(texts) + " |\n|---|---|---|" + "---|" * len(texts))
    for name in given.only:
        arch, keys, _ = VARIANTS[name]
        model = treadle.build(arch, vocab_size=256, **keys)
        values = " | ".join(shown([found[name, text, seed] for seed in range(given.seeds)]) for text in texts)
        print(f"| {name} | {model.parameter_count():,} | {model.flops(LENGTH) / LENGTH / 1e6:.2f} M | {values} |")


if __name__ == "__main__":
    main()
