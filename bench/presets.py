"""What a preset of the transformer should recommend: held-out bits per byte with AdamW and NorMuon at several learning rates, after
equal steps.

    python -m bench.presets [nano ...] [--steps 150] [--seeds 3] [--only WAY ...] [--processes 2] [--output runs/presets]

What a way does not name is the default of the command line (rows, their length, the tokenizer, cosine), but for a rise of a tenth of
the steps: the default's 2% would be three, which costs AdamW .1 bits at 1e-3. Two texts: the bundled novels and Python's standard
library (bench/texts.py); 150 steps of 16 x 256 tokens are less than one pass over either. Every cell is an ordinary run of the command
line on one thread, evaluated on all of its held-out text; an interrupted table continues, and of the CPU seconds the least counts.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from bench.quality import cell, cpu_seconds, grid, table
from bench.texts import file_of
from treadle.distributed.pool import folder_name

WARMUP_STABLE_DECAY = {"lr_scheduler_type": "wsd", "decay_fraction": 0.5, "min_lr_ratio": 0.02}
WAYS: dict[str, dict[str, object]] = {
    **{f"adamw at {rate:g}": {"optim.name": "adamw", "learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)},
    **{f"normuon at {rate:g}": {"optim.name": "normuon", "learning_rate": rate} for rate in (2e-3, 4e-3, 8e-3, 1.6e-2)},
    "adamw at 0.002, wsd": {"optim.name": "adamw", "learning_rate": 2e-3, **WARMUP_STABLE_DECAY},
    "normuon at 0.008, wsd": {"optim.name": "normuon", "learning_rate": 8e-3, **WARMUP_STABLE_DECAY},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.presets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["nano"], help="of the architecture `transformer`")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", nargs="+", default=["austen", "python"], choices=["austen", "python"])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/presets"))
    given = parser.parse_args()
    texts = {text: file_of(text, given.output) for text in given.texts}

    def trained(preset: str, way: str, text: str, seed: int) -> tuple[float, float]:
        folder = given.output / str(given.steps) / f"{preset}-{text}-{folder_name(way)}-{seed}"
        bits = cell(str(texts[text]), folder, {
            "model.preset": preset, "max_steps": given.steps, "warmup_steps": given.steps // 10, "eval_steps": given.steps,
            "eval_rows": "null", "save_steps": given.steps, "save_total_limit": 1, "sample_tokens": 0, "precision": "fp32",
            "seed": seed, "output_dir": folder, **WAYS[way],
        })  # fmt: skip
        print(f"{preset}, {text}, {way}, seed {seed}: {bits:.4f} bits per byte", flush=True)
        return bits, cpu_seconds(folder)

    for preset in given.presets:
        found = grid(given.only, texts, given.seeds, given.processes, functools.partial(trained, preset))
        print(f"\n{preset}, {given.steps} steps; mean over {given.seeds} seed(s) (largest - smallest)")
        print("\n".join(table(found, given.only[0], "optimiser and learning rate")))


if __name__ == "__main__":
    main()
