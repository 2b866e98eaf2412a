"""What the optimiser, vocabulary and token shift of the demo's recipe are worth, and some further measures: held-out bits per byte after
equal steps, and what these cost.

    python -m bench.learning [--steps 200] [--seeds 3] [--only CHANGE ...] [--processes 2] [--output runs/learning]

Every row is the recipe with one change. Two texts: the bundled novels and Python's standard library (bench/texts.py). Every cell is an
ordinary run of the command line on one thread, so the same command goes on with an interrupted table, and no figure but the CPU
seconds depends on what else the machine does; of those the least of a row's runs counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.quality import cell, cpu_seconds, grid, table
from bench.texts import file_of
from treadle.distributed.pool import folder_name

RECIPE = Path(__file__).parents[1] / "recipes" / "austen.toml"
CHANGES: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "optim.name = muon": {"optim.name": "muon"},
    **{f"optim.name = soap at {rate:g}": {"optim.name": "soap", "learning_rate": rate} for rate in (1e-3, 3e-3, 8e-3)},
    "optim.ema = 0.99": {"optim.ema": 0.99},
    "tokenizer.vocab_size = 2048": {"vocab_size": 2048},
    "no token_shift": {"model.token_shift": False},
    "no value_embeddings": {"model.value_embeddings": False},
    "neither": {"model.token_shift": False, "model.value_embeddings": False},
    "model.mlp = relu2": {"model.mlp": "relu2"},
    "model.logit_softcap = 15": {"model.logit_softcap": 15},
    "twice the rows in the second half, of as many tokens": {"batch_size_schedule": "[[0, 1], [0.5, 2]]", "steps": 2 / 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(CHANGES), default=list(CHANGES), help="some rows; the recipe always")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    given = parser.parse_args()
    texts = {"novels": "austen", "python": str(file_of("python", given.output))}

    def trained(name: str, text: str, seed: int) -> tuple[float, float]:
        change = dict(CHANGES[name])
        steps = round(given.steps * change.pop("steps", 1))  # a share of them
        wanted: dict[str, object] = {"max_steps": steps, "eval_steps": steps, "save_steps": steps, "sample_tokens": 0,
                                     "save_total_limit": 1, "seed": seed, "data.path": texts[text], **change}  # fmt: skip
        folder = given.output / str(given.steps) / f"{text}-{folder_name(name)}-{seed}"
        bits = cell(str(RECIPE), folder, {**wanted, "output_dir": folder})
        print(f"{text}, {name}, seed {seed}: {bits:.4f} bits per byte", flush=True)
        return bits, cpu_seconds(folder)

    asked = [name for name in CHANGES if name in given.only or not CHANGES[name]]
    found = grid(asked, texts, given.seeds, given.processes, trained)
    print(f"\n{given.steps} steps; mean over {given.seeds} seeds (largest - smallest)")
    print("\n".join(table(found, "the recipe", "one change")))


if __name__ == "__main__":
    main()
