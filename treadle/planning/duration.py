"""How long it takes: operations of a token, operations a second, and from both tokens and hours to a budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.models.base import Model, ModelConfig, build_from
from treadle.objectives.base import ModelWithObjective, Objective
from treadle.ops import precision as number_formats
from treadle.ops.peak import PEAK_BF16
from treadle.planning.step_trace import Shape, period_of
from treadle.registry import nearest
from treadle.training import resolve

UTILISATION = 0.4  # of a GPU's data sheet; 0.3 to 0.5 is usual for dense transformers (PaLM, table 3: 21% to 46%)


@dataclass(frozen=True)
class Duration:
    """Of one process's share; hours and steps of a budget of tokens, or of hours."""

    flops_per_token: float
    tokens_per_second: float  # of all processes
    step_seconds: float
    tokens: float | None = None
    hours: float | None = None
    steps: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def duration(
    flops_per_token: float, tokens_per_step: int, step_seconds: float, *, tokens: float | None = None, hours: float | None = None,
    step_sizes: Callable[[int], int] = lambda steps: steps,
) -> Duration:  # fmt: skip
    """tokens_per_step: of all processes, where the batch does not grow; step_sizes: steps of a run -> such batches in all of them.
    ConfigError where both budgets are given."""
    if tokens is not None and hours is not None:
        raise ConfigError("--tokens and --hours are two budgets; keep one, the other follows from it")
    rate = tokens_per_step / step_seconds
    if hours is not None:
        tokens = rate * hours * 3600
    elif tokens is not None:
        hours = tokens / rate / 3600
    steps = _steps_of(max(1, round(tokens / tokens_per_step)), step_sizes) if tokens is not None else None
    return Duration(flops_per_token, rate, step_seconds, tokens, hours, steps)


def _steps_of(batches: int, step_sizes: Callable[[int], int]) -> int:
    """The least number of steps that take so many batches; a step takes one or more."""
    least, most = 1, batches
    while least < most:
        middle = (least + most) // 2
        least, most = (middle + 1, most) if step_sizes(middle) < batches else (least, middle)
    return least


def gpu_named(name: str) -> str:
    """The GPU of ops/peak.py that is meant, by its name there; ConfigError for an unknown one."""
    plain = {known.lower().replace(" ", "").replace("-", ""): known for known in PEAK_BF16}
    asked = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if asked not in plain:
        raise ConfigError(f"--gpu {name}: {nearest(name, list(PEAK_BF16))} For another one give its speed: --flops 1e14")
    return plain[asked]


def flops_of_gpu(name: str, utilisation: float) -> float:
    """Operations a second of a known GPU at this share of its bf16 data sheet; ConfigError for an unknown one."""
    return PEAK_BF16[gpu_named(name)] * utilisation


def measured_flops(width: int, precision: str) -> float:
    """Floating-point operations a second of a product of the model's width on this machine, in about .1 s."""
    dtype = number_formats.DTYPES[precision]
    left, right = torch.ones(2048, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    left @ right
    rounds, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < 0.1:
        left @ right
        rounds += 1
    return 2.0 * 2048 * width * width * rounds / (time.perf_counter() - begun)


def measured_seconds(cls: type[Model], config: ModelConfig, objective: Objective, shape: Shape, batch: Batch) -> float:
    """Seconds of one forward and backward pass of a micro-batch, really run on this machine's CPU: the best of two. Where
    blocks repeat, models of one and of two periods are run, and each further period costs their difference."""
    period, count = period_of(cls, config)

    def seconds(config: ModelConfig) -> float:
        model = build_from(cls, config)
        resolve.set_checkpointing(model, shape.gradient_checkpointing)
        module = ModelWithObjective(model, objective).train()
        taken = []
        for _ in range(3):  # the first is slower
            begun = time.perf_counter()
            with number_formats.autocast(shape.precision, torch.device("cpu")):
                parts = module(batch)
            sum(part.total for part in parts.losses.values()).backward()
            taken.append(time.perf_counter() - begun)
            model.zero_grad()
        return min(taken[1:])

    if not period or count <= 2 * period or not isinstance(shape.gradient_checkpointing, bool):
        return seconds(config)
    one, two = (seconds(config.model_copy(update={"num_layers": n * period})) for n in (1, 2))
    return one + max(0.0, two - one) * (count / period - 1)
