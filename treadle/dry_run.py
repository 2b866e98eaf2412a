"""What can be asked of a recipe before a run is started: what it needs (`treadle plan`), and whether it works (`treadle check`)."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from treadle.distributed.environment import detect
from treadle.errors import ConfigError
from treadle.monitor.console import Console
from treadle.ops.memory import peak_resident_bytes
from treadle.planning.command import FLAGS, answer, switch, taken
from treadle.recipe import RECIPE_FLAGS, Layer, compose
from treadle.settings import plain
from treadle.start import Request, configure, make_trainer
from treadle.training.advice import on_out_of_memory
from treadle.training.config import Recipe
from treadle.training.schedule import learning_rate


def plan(request: Request, console: Console | None = None) -> dict[str, Any]:
    """What a recipe needs on `--world` processes, what fits, or the table of sizes; reads no text and starts nothing."""
    console = console or Console()
    flags = dict(request.flags or {})
    own = taken(flags, FLAGS)
    request = replace(request, flags=flags, other_flags=("from", "help", *FLAGS))
    target = request.target if isinstance(request.target, str) else None
    layers = request.layers()
    if switch("recommend", own.get("recommend", False)):  # the line to type names a text, which the default recipe is not under
        layers = [layer for layer in layers if not layer.unasked]
    files = {name: str(value) for name, value in flags.items() if plain(name) in RECIPE_FLAGS}

    def again(keys: Mapping[str, object]) -> Recipe:
        return compose([*layers[:-1], Layer(dict(keys), "recommended"), layers[-1]])  # a preset resets the model's keys below it, not what is typed

    result, text = answer(compose(layers), own, target, again, files)
    for line in [json.dumps(result, indent=1)] if switch("json", own.get("json", False)) else text:
        console.say(line)
    return result


def check(request: Request, console: Console | None = None) -> dict[str, Any]:
    """Composes, builds and runs one real micro-step without writing a run; returns what it saw."""
    console = console or Console()
    if detect().size > 1:
        raise ConfigError("check runs in one process; start it without torchrun (what several need: treadle plan)")
    request = Request(request.target, request.flags, True, request.weights_from)
    with tempfile.TemporaryDirectory(prefix="treadle-check-") as scratch:
        recipe = configure(request, Path(scratch))
        recipe.checkpoint.mirror = None  # nothing is saved
        origins = dict(recipe.origins)
        trainer = make_trainer(request, recipe, console)
        micro_batches, _ = next(iter(trainer.dataset.batches(trainer.dataset.start, trainer.context.batch_plan)))
        with on_out_of_memory(trainer.model, trainer.assembly.optimizers, recipe, trainer.plan):
            begun = time.perf_counter()
            rate = learning_rate(recipe.optim, 0, trainer.plan.max_steps)
            result = trainer.assembly.stepper.run(0, micro_batches[:1], rate, False)
            seconds = time.perf_counter() - begun
    for section, table in recipe.tables().items():
        for key, value in table.items():
            dotted = f"{section}.{key}"
            if value is not None and dotted != "run.output_dir":
                console.say(f"{dotted} = {value}    ({origins.get(dotted, 'default')})")
    held_out = trainer.context.eval_dataset
    lowest = trainer.objective.lowest_loss(trainer.model, held_out) if held_out is not None else None
    if lowest is not None:
        console.say(f"floor of the loss on validation: {lowest[0]:.4f}: {lowest[1]}")
    found = {"loss": result.loss, "grad_norm": result.grad_norm, "seconds": seconds, "peak_gb": peak_resident_bytes() / 1e9,
             "parameters": trainer.run_folder.parameter_count, "max_steps": trainer.plan.max_steps}  # fmt: skip
    console.say(f"one micro-step of {trainer.plan.micro_batch} x {trainer.dataset.seq_len}: loss {result.loss:.4f}, "
                f"grad {result.grad_norm:.3f}, {seconds:.2f} s, peak {found['peak_gb']:.2f} GB. It works.")  # fmt: skip
    return found
