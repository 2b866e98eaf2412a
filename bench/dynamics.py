"""INL dynamics beside the same transformer without them: what they cost, and whether they help at equal steps and data.

    python -m bench.dynamics [--rounds 7] [--only cost | quality] [--seeds 3] [--steps 300] [--rate 4e-3]
                             [--device cuda]

cost: CPU seconds of a training step taken in turns (A B A B), and bytes that autograd keeps, each against the plain model.
quality: bits per byte of held-out text after training on the bundled text as bytes; every variant sees the same rows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import treadle
from bench.side_by_side import medians
from bench.task import Task
from treadle.data.batch import Batch
from treadle.layers import dynamics as layer
from treadle.models.base import Model
from treadle.objectives.base import ModelWithObjective
from treadle.objectives.next_token import NextToken
from treadle.ops import dynamics as ops
from treadle.ops.memory import keep_freed_memory
from treadle.ops.precision import resolve
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings
from treadle.training.step import Stepper

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"dynamics": "none"},
    "none, with biases": {"dynamics": "none", "attention_bias": True, "mlp_bias": True},  # what mu alone could be
    "lite, attention": {"dynamics": "lite"},
    "full, attention": {"dynamics": "full"},
    "full, post": {"dynamics": "full", "dynamics_placement": "post"},
}
LARGE = Task(width=384, layers=2, heads=6, rows=8)  # of the costs
SMALL = Task(width=64, layers=4, heads=2, length=128, rows=8, learning_rate=4e-3)  # of the quality
WARMUP, HELD_OUT = 20, 256  # steps; rows


def built(task: Task, keys: dict[str, Any], seed: int = 0) -> Model:
    return treadle.build("transformer", seed=seed, vocab_size=task.vocabulary, hidden_size=task.width, num_layers=task.layers,
                         num_heads=task.heads, **keys)  # fmt: skip


def stepper_of(model: Model, task: Task, seed: int, precision: str = "fp32") -> Stepper:
    settings = OptimSettings(learning_rate=task.learning_rate, weight_decay=task.weight_decay)
    return Stepper(ModelWithObjective(model, NextToken()), Optimizers(model, settings), seed=seed, precision=precision,
                   max_grad_norm=1.0, loss_weights={})  # fmt: skip


def saved_bytes(model: Model, batch: Batch, precision: str) -> int:
    """What autograd keeps of a forward pass beside the parameters, each storage once."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), treadle.autocast(precision):
        out = model.train().hidden(batch)
    assert out.hidden is not None
    return sum(size for size, _ in kept.values())


def cost(rounds: int) -> None:
    """Also of the plain form under autograd, which the memory-saving one replaces. In the number formats that pay here."""
    batch = Batch.for_training(torch.from_numpy(LARGE.batch(LARGE.data(), 0)[:, : LARGE.length]))
    for precision in sorted({"fp32", resolve("auto", torch.device("cpu"), LARGE.width)}, reverse=True):
        ways: dict[str, Callable[[], Any]] = {}
        saved: dict[str, int] = {}
        for name, keys in {**VARIANTS, "full, plain autograd": VARIANTS["full, attention"]}.items():
            model = built(LARGE, keys)
            stepper, plain = stepper_of(model, LARGE, 0, precision), name.endswith("autograd")

            def step(stepper: Stepper = stepper, plain: bool = plain) -> None:
                layer.dynamics = ops.dynamics_reference if plain else ops.dynamics  # type: ignore[assignment]
                stepper.run(0, [batch], 1e-4)

            step()
            ways[name], saved[name] = step, saved_bytes(model, batch, precision)
        found = medians(ways, rounds, 1)
        layer.dynamics = ops.dynamics
        print(f"\n{precision}, {LARGE.layers} blocks of width {LARGE.width}, {LARGE.rows} rows x {LARGE.length}: against none "
              f"({found['none']:.2f} CPU seconds a step, {saved['none'] / 1e6:.0f} MB kept)")  # fmt: skip
        for name in ways:
            print(f"{name:<22}time {found[name] / found['none']:.2f}   kept {saved[name] / saved['none']:.2f}", flush=True)


def trained(name: str, seed: int, steps: int, highest: float, data: np.ndarray, device: str) -> float:
    """Bits per byte on text after the part that is trained on."""
    task, held = SMALL, HELD_OUT * SMALL.length + 1
    model = built(task, VARIANTS[name], seed).to(device)
    stepper, generator = stepper_of(model, task, seed), np.random.default_rng(seed)
    for step in range(steps):
        starts = generator.integers(0, len(data) - held - task.length, task.rows)
        rows = np.stack([data[s : s + task.length] for s in starts]).astype(np.int64)
        rate = highest * min((step + 1) / WARMUP, 0.5 + 0.5 * np.cos(np.pi * step / steps))
        stepper.run(step, [Batch.for_training(torch.from_numpy(rows)).to(device)], float(rate))
    rows = data[-held:-1].reshape(HELD_OUT, task.length).astype(np.int64)
    nats = labels = 0.0
    model.eval()
    with torch.no_grad():
        for part in torch.from_numpy(rows).split(64):
            sums = NextToken().evaluation_sums(model, Batch.for_training(part).to(device))
            nats, labels = nats + float(sums["nats"]), labels + sums["labels"]
    return nats / labels / float(np.log(2))


def quality(seeds: int, steps: int, rate: float, device: str) -> None:
    data = SMALL.data()
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        for name, values in found.items():
            values.append(trained(name, seed, steps, rate, data, device))
            print(f"seed {seed}, {name}: {values[-1]:.4f} bits per byte", flush=True)
    print(f"\n{SMALL.layers} blocks of width {SMALL.width}, {steps} steps of {SMALL.rows} rows x {SMALL.length} bytes, learning rate {rate:g}, "
          f"{seeds} seeds")
    print(f"{'':<22}{'parameters':>12}{'bits per byte':>20}{'against none, same seed':>28}")
    for name, values in found.items():
        gaps = [value - plain for value, plain in zip(values, found["none"])]
        print(f"{name:<22}{built(SMALL, VARIANTS[name]).parameter_count():>12,}{_spread(values):>20}{_spread(gaps):>28}")


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} +- {deviation:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.dynamics", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["cost", "quality"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=SMALL.learning_rate, help="highest learning rate of the quality")
    parser.add_argument("--device", default="cpu", help="of the quality; the cost is a CPU's")
    given = parser.parse_args()
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if given.only in (None, "cost"):
        cost(given.rounds)
    if given.only in (None, "quality"):
        quality(given.seeds, given.steps, given.rate, given.device)


if __name__ == "__main__":
    main()
