"""Token mixers side by side: quality at equal parameters and equal bytes, the cost of a step, and the decoding state.

    python -m bench.mixers [austen] [--seeds 3] [--steps 600] [--only ssd hybrid] [--output runs/mixers] [--no-timing]
                           [--device cuda --jobs 9]

Every cell is an ordinary run of the command line in a folder of its own, evaluated on held-out text: an interrupted table goes on
where it was, and a finished cell is only read. The MLP of each model is as wide as makes its parameters those of full attention.
All learn at one rate (--rate), which is nobody's best.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import treadle
from bench.quality import cell
from bench.texts import file_of
from treadle.data.batch import Batch
from treadle.models.base import Model, parameter_count
from treadle.models.transformer import Transformer, TransformerConfig
from treadle.objectives.next_token import NextToken
from treadle.ops.memory import keep_freed_memory

REFERENCE = "full_attention"
PATTERNS = {
    REFERENCE: ["full_attention"],
    "hybrid": ["ssd", "ssd", "ssd", "full_attention"],
    **{name: [name] for name in ("block_sparse_attention", "linear_attention", "ssd", "hgrn", "retnet", "rwkv", "gated_deltanet")},
}
ROWS, TOKENS = 8, 1000  # tokens: at which the decoding state is weighed
SHAPE: dict[str, Any] = {"hidden_size": 96, "num_layers": 4, "num_heads": 3, "low_rank_size": 16, "attention_block_size": 32}


def keys_of(name: str) -> dict[str, Any]:
    """The model's keys, its MLP as wide as makes its parameters those of full attention."""
    shape = {"vocab_size": 256, **SHAPE}

    def count(**keys: Any) -> int:
        return parameter_count(Transformer, TransformerConfig.with_preset(None, **{**shape, **keys}))

    wanted = count(intermediate_size=256)
    at, wider = (count(layer_types=PATTERNS[name], intermediate_size=width) for width in (32, 33))
    width = 32 + max(1 - 32, round((wanted - at) / (wider - at)))
    return {**SHAPE, "layer_types": PATTERNS[name], "intermediate_size": width}


def built(name: str) -> Model:
    return treadle.build("transformer", vocab_size=256, **keys_of(name))


def trained(name: str, source: str, seed: int, given: argparse.Namespace) -> float:
    """Bits per byte on the held-out text, from the run if it is there."""
    steps, rate, length = given.steps, given.rate, given.length
    folder = Path(given.output) / f"{Path(source).stem}-{name}-{steps}-{length}-{rate:g}-{seed}"
    return cell(source, folder, {
        "max_steps": steps, "seq_len": length, "per_device_train_batch_size": ROWS, "warmup_steps": min(25, steps // 4), "lr": rate,
        "precision": "fp32", "tokenizer": "byte", "seed": seed, "eval_rows": given.eval_rows, "eval_steps": steps, "save_steps": steps,
        "output_dir": folder, "device": given.device, "model.arch": "transformer", **keys_of(name),
    })  # fmt: skip


def step_of(name: str, length: int) -> Callable[[], Any]:
    model, generator = built(name).train(), torch.Generator().manual_seed(0)
    batch = Batch.for_training(torch.randint(0, 256, (ROWS, length), generator=generator))
    return lambda: NextToken()(model, batch).losses["next_token"].total.backward()


def relative_cost(name: str, length: int, rounds: int) -> float:
    """CPU seconds of a forward and backward pass, full attention's being 1: A B A B, the median of the ratios of neighbours."""
    ways, ratios = [step_of(REFERENCE, length), step_of(name, length)], []
    for number in range(rounds + 1):
        taken = []
        for way in ways:
            begun = time.process_time()
            way()
            taken.append(time.process_time() - begun)
        if number:  # the first warms up
            ratios.append(taken[1] / taken[0])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.mixers", description=__doc__)
    parser.add_argument("text", nargs="?", default="austen")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--length", type=int, default=256, help="bytes of a row")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate of all")
    parser.add_argument("--eval-rows", default="null", help="held-out rows that are evaluated; null: all")
    parser.add_argument("--only", nargs="*", choices=list(PATTERNS), help="some of the models")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing")
    parser.add_argument("--no-timing", action="store_true", help="train alone")
    parser.add_argument("--device", default="auto", help="that trains")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", default="runs/mixers")
    given = parser.parse_args()
    given.text = str(file_of(given.text, Path(given.output)))
    keep_freed_memory()
    found: dict[str, list[float]] = {name: [] for name in given.only or PATTERNS}
    cells = [(name, seed) for seed in range(given.seeds) for name in found]
    with ThreadPoolExecutor(given.jobs) as several:
        for (name, seed), value in zip(cells, several.map(lambda cell: trained(cell[0], given.text, cell[1], given), cells)):
            found[name].append(value)
            print(f"{name}, seed {seed}: {value:.4f} bits per byte", flush=True)
    print(f"\n{given.steps} steps of {ROWS} rows x {given.length} bytes of {Path(given.text).stem}, learning rate {given.rate:g}, {given.seeds} seeds; "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    print(f"{'':<24}{'bits per byte':>20}{'parameters':>12}{'CPU time a step':>18}{f'state at {TOKENS}':>16}")
    for name, values in found.items():
        model = built(name)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        cost = "" if given.no_timing else f"{relative_cost(name, given.length, given.rounds):.2f}"
        print(f"{name:<24}{f'{statistics.mean(values):.3f} +- {deviation:.3f}' if values else '':>20}{model.parameter_count():>12,}{cost:>18}"
              f"{model.state_bytes(1, TOKENS):>16,}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
