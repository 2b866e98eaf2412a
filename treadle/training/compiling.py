"""Changes whether blocks are compiled, where torch_compile = auto: by what a step takes here with and without.

Compiled blocks cost 1.02 to 1.7 times less CPU than eager ones, depending on the machine, and 10 to 50 seconds before their
first step. So both are measured, on steps that change nothing, and remembered in the cache by machine, versions, model and
batch. The answer goes into the run's config.toml: the two forms round differently, and a run that goes on keeps its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from treadle.data.base import BatchPlan, Dataset
from treadle.data.batch import Batch
from treadle.distributed.world import World
from treadle.errors import TreadleError
from treadle.files import cache_root, write_atomically
from treadle.models.base import Model
from treadle.monitor.console import Console
from treadle.ops.memory import is_out_of_memory
from treadle.training.assembly import Assembly
from treadle.training.config import Recipe
from treadle.training.resolve import Schedule, compile_blocks

BEST_GAIN = 1.7  # the most that was measured on any machine
COLD_SECONDS = 50.0  # the longest that compiling the blocks took there
WORTH = 1.05  # below this the two are one within the noise of a step
STEPS = 2  # each form is measured by the faster of these, after one that warms up


@dataclass(frozen=True)
class Measured:
    """Seconds of a step in both forms (CPU seconds on a CPU), and what the first compiled one took beyond; problem: why there
    is no compiled one."""

    eager: float
    compiled: float = 0.0
    cold: float = 0.0
    problem: str = ""


def settle(
    recipe: Recipe, plan: Schedule, assembly: Assembly, data: Dataset, share: BatchPlan, world: World, console: Console
) -> None:  # fmt: skip
    """Puts true or false in the place of auto, and compiles the blocks for true."""
    if recipe.train.torch_compile != "auto":
        return
    device = assembly.stepper.device
    reason = _impossible(device, world, assembly)
    if reason:
        chosen = False
    else:
        place = _place(recipe, plan, device)
        known = _remembered(place)
        found = known or _measure(assembly, data, share, plan.max_steps)
        if found is not None and known is None:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps(asdict(found)))
        chosen, reason = decide(found, plan.max_steps, paid=known is None)
        _uncompile(assembly.model)
    console.say(f"torch_compile = auto: {'compiled' if chosen else 'eager'} ({reason})")
    recipe.train.torch_compile = chosen
    if chosen:
        compile_blocks(assembly.model)


def decide(found: Measured | None, steps: int, paid: bool) -> tuple[bool, str]:
    """(whether to compile, why). found: None where the run is too short to earn what compiling may cost; paid: the compiled
    blocks are there already."""
    if found is None:
        return False, f"{steps} steps are too few to earn the compiler's time back"
    if found.problem:
        return False, f"torch.compile does not work here: {found.problem}"
    gain = found.eager / max(found.compiled, 1e-9)
    said = f"a step takes {found.eager:.3g} s, compiled {found.compiled:.3g} s ({gain:.2f}x), compiling {found.cold:.0f} s"
    if gain < WORTH:
        return False, said
    if not paid and steps * (found.eager - found.compiled) < found.cold:
        return False, f"{said}; {steps} steps are too few for that"
    return True, said


def _uncompile(model: Model) -> None:
    for block in model.blocks():
        block._compiled_call_impl = None


def _impossible(device: torch.device, world: World, assembly: Assembly) -> str:
    """Why it is not even tried; "" where it is."""
    if world.size > 1 or assembly.strategy.engine_owns_step:
        return "not measured with several processes; --torch_compile true compiles"
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "there is no C++ compiler"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def _place(recipe: Recipe, plan: Schedule, device: torch.device) -> Path:
    """Where the measurement of this machine, these versions, this model and batch is kept."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    key = [machine, torch.__version__, platform.python_version(), torch.get_num_threads(), recipe.arch, recipe.model, recipe.train.precision,
           plan.micro_batch, recipe.data.seq_len, recipe.train.gradient_checkpointing]  # fmt: skip
    return cache_root(None) / "compiled" / f"{hashlib.sha256(json.dumps(key, default=str, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    except OSError:
        return platform.processor() or platform.machine()


def _remembered(place: Path) -> Measured | None:
    try:
        return Measured(**json.loads(place.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _measure(assembly: Assembly, data: Dataset, share: BatchPlan, steps: int) -> Measured | None:
    """Steps without an update on the first batches; None where not even the greatest gain would pay within `steps`."""
    micros = [micro for micro, _ in itertools.islice(data.batches(data.start, share.alone()), 1 + STEPS)]
    if not micros:
        return None
    try:
        _, eager = _time(assembly, micros)
        if steps * eager * (1 - 1 / BEST_GAIN) < COLD_SECONDS:
            return None
        compile_blocks(assembly.model)
        try:
            first, compiled = _time(assembly, micros)
        except Exception as problem:
            if isinstance(problem, TreadleError) or is_out_of_memory(problem):
                raise
            return Measured(eager, problem=f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:120] if str(problem) else ''}")
        return Measured(eager, compiled, max(0.0, first - compiled))
    finally:
        assembly.optimizers.zero_grad()


def _time(assembly: Assembly, micros: Sequence[list[Batch]]) -> tuple[float, float]:
    """Seconds of the first step, and the least of the others."""
    on_cpu = assembly.stepper.device.type == "cpu"
    clock, taken = time.process_time if on_cpu else time.perf_counter, []
    for turn in range(1 + STEPS):
        begun = clock()
        assembly.stepper.run(0, micros[turn % len(micros)], 0.0, update=False)
        taken.append(clock() - begun)
    return taken[0], min(taken[1:])
