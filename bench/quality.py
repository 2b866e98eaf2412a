"""Quality at equal bytes seen: flat ternary and hierarchical byte models beside dense transformers of equal parameters and of
equal FLOPs a byte.

    python -m bench.quality austen --texts shakespeare=FOLDER [--seeds 3] [--steps 600] [--output FOLDER]

Every cell is an ordinary run of the command line (so an interrupted table continues), evaluated on all of its held-out text.
Learning rates are the best of 2e-3, 4e-3, 8e-3 and 1.6e-2 for each model after 250 steps on the first text, one seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import treadle
from bench.texts import file_of
from treadle.models.base import Model

Found = TypeVar("Found")
ROWS, LENGTH, WARMUP = 16, 256, 25
HIERARCHY = {"hidden_sizes": [96, 128], "num_blocks": [[1, 0, 1], [3]], "target_ratios": [4.0]}
DENSE = {"num_heads": 4, "tie_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, object], float]] = {
    "dense": ("transformer", {**DENSE, "hidden_size": 128, "num_layers": 4, "intermediate_size": 512}, 4e-3),
    "dense, FLOPs of hnet": ("transformer", {**DENSE, "hidden_size": 96, "num_layers": 3, "intermediate_size": 288}, 4e-3),
    "hgrn_bit": ("hgrn_bit", {"hidden_size": 128, "num_layers": 4}, 6e-3),
    "hnet": ("hnet", HIERARCHY, 8e-3),
}


def trained(model: tuple[str, dict[str, object], float], source: str, seed: int, steps: int, folder: Path) -> float:
    """Bits per byte on the held-out text, from the run in `folder` if it is there. model: as in MODELS."""
    arch, keys, rate = model
    wanted = {"max_steps": steps, "seq_len": LENGTH, "per_device_train_batch_size": ROWS, "warmup_steps": WARMUP, "lr": rate,
              "precision": "fp32", "tokenizer": "byte", "seed": seed, "eval_rows": "null", "eval_steps": steps, "sample_tokens": 0,
              "save_steps": steps, "output_dir": folder, "model.arch": arch, **keys}  # fmt: skip
    return cell(source, folder, wanted)


def cell(source: str, folder: Path, wanted: dict[str, object]) -> float:
    """Bits per byte on held-out text at step `max_steps` of a run of the command line in `folder`; read alone where it is there."""
    step = int(str(wanted["max_steps"]))
    if (found := _evaluated(folder, step)) is None:
        flags = [part for key, value in wanted.items() for part in (f"--{key}", _typed(value))]
        done = subprocess.run([sys.executable, "-m", "treadle", "train", source, *flags], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{folder}:\n{done.stderr}")
        found = _evaluated(folder, step)
        assert found is not None, f"{folder} has no evaluation at step {step}"
    return found


def grid(names: Iterable[str], texts: Iterable[str], seeds: int, processes: int,
         one: Callable[[str, str, int], Found]) -> dict[tuple[str, str, int], Found]:
    """(name, text, seed) -> what `one` finds of it, `processes` at a time, each on one thread; first all of the first seed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cells = [(name, text, seed) for seed in range(seeds) for text in texts for name in names]
    with ThreadPoolExecutor(processes) as pool:
        return dict(zip(cells, pool.map(lambda cell: one(*cell), cells)))


def shown(values: list[float], digits: int = 3) -> str:
    """The mean of several seeds, in brackets the largest minus the smallest."""
    return f"{statistics.mean(values):.{digits}f} ({max(values) - min(values):.{digits}f})"


def cpu_seconds(folder: Path) -> float:
    """What the run in `folder` took."""
    return float(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["cpu_seconds"])


def table(found: dict[tuple[str, str, int], tuple[float, float]], base: str, what: str) -> list[str]:
    """The lines of a Markdown table. found: (name, text, seed) -> bits per byte, CPU seconds; of the latter the least of a name's runs,
    beside those of the name `base`. what: the head of the first column."""
    texts = list(dict.fromkeys(text for _, text, _ in found))
    spent = {name: min(seconds for (n, *_), (_, seconds) in found.items() if n == name) for name, *_ in found}
    lines = [f"| {what} | CPU seconds, of {base} | " + " | ".join(texts) + " |", "|---|---|" + "---|" * len(texts)]
    for name in spent:
        values = [[bits for (n, t, _), (bits, _) in found.items() if n == name and t == text] for text in texts]
        lines.append(f"| {name} | {spent[name] / spent[base]:.2f} | " + " | ".join(shown(v, 4) for v in values) + " |")
    return lines


def _evaluated(folder: Path, step: int) -> float | None:
    log = folder / "eval_log.csv"
    if not log.is_file():
        return None
    with log.open() as rows:
        return next((float(row["bpb"]) for row in reversed(list(csv.DictReader(rows))) if int(row["step"]) == step), None)


def _typed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", '"')


def built(name: str) -> Model:
    arch, keys, _ = MODELS[name]
    return treadle.build(arch, vocab_size=256, **keys)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("first", help="the text that learning rates were chosen on")
    parser.add_argument("--texts", nargs="*", default=[], help="further texts, NAME=PATH")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", default="runs/quality")
    given = parser.parse_args()
    texts = {Path(given.first).stem: str(file_of(given.first, Path(given.output))), **dict(text.split("=", 1) for text in given.texts)}
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(given.seeds):
        for text, source in texts.items():
            for name in MODELS:
                folder = Path(given.output) / f"{text}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                value = trained(MODELS[name], source, seed, given.steps, folder)
                found.setdefault((name, text), []).append(value)
                print(f"{text}, {name}, seed {seed}: {value:.4f} bits per byte", flush=True)
    print(f"\n{given.steps} steps of {ROWS} rows x {LENGTH} bytes; mean over {given.seeds} seeds (largest - smallest)")
    print(f"{'':<22}{'parameters':>12}{'FLOPs a byte':>14}" + "".join(f"{text:>20}" for text in texts))
    for name in MODELS:
        model = built(name)
        cells = [shown(found[name, text]) for text in texts]
        print(f"{name:<22}{model.parameter_count():>12,}{model.flops(LENGTH) / LENGTH:>14,.0f}" + "".join(f"{c:>20}" for c in cells))


if __name__ == "__main__":
    main()
