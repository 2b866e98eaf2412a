"""Rows for the step: what gathering them costs, and what packed documents save over padded ones in useful tokens per CPU-second.

    python -m bench.packing [--quick]

Gathering: one batch of 16 rows from the prepared text, ours (one vectorised gather) beside a slice of the memory map a row, as plain
loops do it. Packing: training steps on paragraphs as documents, packed (isolated from each other, exactly) beside one padded document
a row, at equal rows and row length; only tokens that are no padding count. `bench.data` has streams, workers and peers.
"""

from __future__ import annotations

import argparse
import json
import lzma
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

LENGTH, ROWS = 512, 8
CORPUS = Path(__file__).parents[1] / "treadle" / "corpus" / "austen.txt.xz"


def documents(path: Path, count: int) -> None:
    """The first paragraphs of the bundled novels as JSON lines."""
    texts = [p for p in lzma.open(CORPUS, "rt", encoding="utf-8").read().split("\n\n") if len(p) > 40]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:count]), encoding="utf-8")


def gathering(rounds: int, batches: int = 200, rows: int = 16, length: int = 1024) -> dict[str, float]:
    """CPU milliseconds a batch of [rows, length + 1] int64."""
    import treadle
    from treadle.data.base import BatchPlan

    data = treadle.Dataset.load("austen", tokenizer="byte", seq_len=length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        np.tile(np.arange(65536, dtype=np.uint16), 64).tofile(path)
        map_, dice = np.memmap(path, dtype=np.uint16, mode="r"), np.random.default_rng(0)

        def plain() -> None:
            for _ in range(batches):
                starts = dice.integers(0, len(map_) - length - 1, rows)
                x = torch.stack([torch.from_numpy(map_[s : s + length].astype(np.int64)) for s in starts])
                y = torch.stack([torch.from_numpy(map_[s + 1 : s + 1 + length].astype(np.int64)) for s in starts])
                assert x.shape == y.shape

        def ours() -> None:
            for _, _ in zip(range(batches), data.batches(data.start, BatchPlan(0, rows))):
                pass

        taken: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(rounds):
            for name, way in (("ours", ours), ("plain", plain)):
                begun = time.process_time()
                way()
                taken[name].append((time.process_time() - begun) / batches * 1e3)
    return {name: statistics.median(values) for name, values in taken.items()}


def useful_tokens(source: Path, packing: str, steps: int) -> tuple[float, float]:
    """(tokens that are no padding per CPU-second of training, share of places that hold one)."""
    import treadle
    from treadle.data.base import BatchPlan
    from treadle.objectives.base import ModelWithObjective
    from treadle.objectives.next_token import NextToken
    from treadle.training.optim import Optimizers
    from treadle.training.settings import OptimSettings
    from treadle.training.step import Stepper

    data = treadle.Dataset.load(str(source), tokenizer="byte", seq_len=LENGTH, packing=packing, validation_fraction=0.0)
    model = treadle.build("transformer", vocab_size=data.tokenizer.vocab_size, hidden_size=192, num_layers=3, num_heads=3)
    stepper = Stepper(ModelWithObjective(model, NextToken()), Optimizers(model, OptimSettings()), seed=0, precision="fp32",
                      max_grad_norm=1.0, loss_weights={})  # fmt: skip
    tokens, places, begun = 0, 0, 0.0
    for step, (batches, _) in zip(range(steps + 1), data.batches(data.start, BatchPlan(0, ROWS))):
        stepper.run(step, batches, 1e-3)
        if step == 0:
            begun = time.process_time()
            continue
        tokens += sum(batch.counts["tokens"] for batch in batches)
        places += sum(batch.input_ids.numel() for batch in batches)
    return tokens / (time.process_time() - begun), tokens / places


def measure(quick: bool) -> dict[str, Any]:
    from treadle.ops.memory import keep_freed_memory

    keep_freed_memory()
    gather = gathering(1 if quick else 5, batches=50 if quick else 200)
    values: dict[str, Any] = {"gather of 16 x 1024, ours: CPU ms": gather["ours"], "gather of 16 x 1024, a slice a row: CPU ms": gather["plain"]}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "paragraphs.jsonl"
        documents(source, 400 if quick else 4000)
        pairs, shares = [], {}
        for _ in range(1 if quick else 3):
            rates = {}
            for packing in ("best_fit", "none"):
                rates[packing], shares[packing] = useful_tokens(source, packing, 2 if quick else 12)
            pairs.append(rates["best_fit"] / rates["none"])
    values |= {"share of places used, packed": shares["best_fit"], "share of places used, padded": shares["none"],
               "useful tokens per CPU-second, packed over padded": statistics.median(pairs)}  # fmt: skip
    return values


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.packing", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    for name, value in measure(parser.parse_args().quick).items():
        print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
