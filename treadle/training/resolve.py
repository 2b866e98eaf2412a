"""Changes the configuration to what was resolved, and which blocks recompute: every `auto`, and every default that depends on
data, model or machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from treadle.data.base import DATASETS, Dataset
from treadle.distributed.world import World
from treadle.errors import ConfigError
from treadle.layers.fp8 import Fp8Linear
from treadle.models.base import Model
from treadle.models.catalogue import MODELS
from treadle.monitor.console import Console
from treadle.objectives.base import OBJECTIVES, Objective
from treadle.ops import precision
from treadle.ops.fp8 import MULTIPLE
from treadle.registry import nearest
from treadle.settings import Settings
from treadle.training.config import Recipe
from treadle.training.schedule import sum_before, value_at

SAVES_A_RUN = EVALUATIONS_A_RUN = 10
PROBE_WARNS_BELOW = 0.9


@dataclass(frozen=True)
class Schedule:
    """The resolved numbers of a run."""

    micro_batch: int
    accumulation: int
    global_batch: int
    max_steps: int
    end: int | None  # draws from here on are surplus (after the last epoch) and masked
    save_steps: int
    eval_steps: int
    eval_batch: int  # rows in one pass of an evaluation
    batch_sizes: tuple[tuple[int, int], ...] = ((0, 1),)  # from each step on, global batches in an optimiser step
    lengths: tuple[tuple[int, int], ...] | None = None  # from each step on, tokens in a row; None: as the data has them

    def batches_at(self, step: int) -> int:
        """Global batches of the data in step number `step`."""
        return value_at(self.batch_sizes, step)

    def batches_left(self, step: int) -> int:
        """Global batches of the data in the steps from `step` on."""
        return sum_before(self.batch_sizes, self.max_steps) - sum_before(self.batch_sizes, step)

    def rows_before(self, step: int) -> int:
        """Rows in the first `step` steps."""
        return sum_before(self.batch_sizes, step) * self.global_batch

    def length_at(self, step: int) -> int | None:
        """Tokens in a row of step number `step`, where rows are cut."""
        return None if self.lengths is None else value_at(self.lengths, step)

    def rows_left(self, step: int) -> int | None:
        """Rows that are wanted from `step` on; None where no epoch ends."""
        return None if self.end is None else self.end - self.rows_before(step)


def divisors(number: int) -> list[int]:
    """All numbers that divide `number`, upwards."""
    return [n for n in range(1, number + 1) if number % n == 0]


def batch_sizes(recipe: Recipe, world: int = 1) -> tuple[int, int, int]:
    """(rows of a micro-batch, micro-batches of a step, rows of a step by all processes). ConfigError names the sizes that fit when they do not multiply."""
    micro, accumulation = recipe.train.per_device_train_batch_size, recipe.train.gradient_accumulation_steps
    total = recipe.train.global_batch_size
    if total is None:
        accumulation = accumulation or 1
        return micro, accumulation, micro * accumulation * world
    if total % world:
        raise ConfigError(f"global_batch_size = {total} does not divide by {world} processes; it may be a multiple of {world}"
                          + _change_hint(recipe, "train.global_batch_size"))  # fmt: skip
    if total % (micro * world):
        if recipe.origins.get("train.per_device_train_batch_size", "the run") != "the run":
            raise ConfigError(
                f"global_batch_size = {total} does not divide by per_device_train_batch_size = {micro} x {world} process(es); "
                f"per_device_train_batch_size may be {', '.join(map(str, divisors(total // world)))}"
                + _change_hint(recipe, "train.global_batch_size")
            )
        # Nobody asked for it: a default, or what fitted the number of processes so far.
        micro = max(n for n in divisors(total // world) if n <= micro)
    derived = total // (micro * world)
    stored = recipe.origins.get("train.global_batch_size") == "the run"
    if accumulation is not None and accumulation != derived and not stored:
        raise ConfigError(f"global_batch_size = {total} is {micro} x {derived} x {world} process(es), but "
                          f"gradient_accumulation_steps = {accumulation}; leave one of the two out")  # fmt: skip
    return micro, derived, total


def _change_hint(recipe: Recipe, key: str) -> str:
    if recipe.origins.get(key) != "the run":
        return ""
    return f"; this run was started with {key} = that; another one needs --allow-change {key}"


def schedule(recipe: Recipe, data: Dataset, world: int = 1) -> Schedule:
    """Batch sizes, the number of steps, and how often to save and evaluate. ConfigError for epochs of data without an
    end."""
    micro, accumulation, total = batch_sizes(recipe, world)
    end = None
    if recipe.train.max_steps is not None:
        max_steps = recipe.train.max_steps
    else:
        if data.rows_per_epoch is None:
            raise ConfigError("nobody knows how many rows this data has (a stream, or made without end), so epochs mean nothing; say how "
                              "long to train: --max_steps N")  # fmt: skip
        end = math.ceil(recipe.train.num_train_epochs * data.rows_per_epoch)
        max_steps = max(1, math.ceil(end / total))
    lengths = table_of(recipe.train.seq_len_schedule, max_steps, data.seq_len)
    check_schedules(recipe, data, lengths)
    return Schedule(
        micro, accumulation, total, max_steps, end,
        save_steps=recipe.checkpoint.save_steps or max(1, max_steps // SAVES_A_RUN),
        eval_steps=recipe.eval.eval_steps or max(1, max_steps // EVALUATIONS_A_RUN),
        eval_batch=recipe.eval.per_device_eval_batch_size or micro,
        batch_sizes=table_of(recipe.train.batch_size_schedule, max_steps) or ((0, 1),),
        lengths=lengths,
    )  # fmt: skip


def step_sizes(rows: list[list[float]] | None) -> Callable[[int], int]:
    """Steps of a run -> global batches in all of them, under a batch_size_schedule."""
    return lambda steps: sum_before(table_of(rows, steps) or ((0, 1),), steps)


def table_of(rows: list[list[float]] | None, max_steps: int, most: int | None = None) -> tuple[tuple[int, int], ...] | None:
    """[[step or share, n], ...] as steps of a run of max_steps; n at most `most`. Of rows at one step the last counts."""
    if rows is None:
        return None
    return tuple((round(step * max_steps) if step < 1 else int(step), int(n) if most is None else min(int(n), most)) for step, n in rows)


def check_schedules(recipe: Recipe, data: Dataset, lengths: tuple[tuple[int, int], ...] | None) -> None:
    """ConfigError for schedules that do not fit the rows or the engine."""
    train = recipe.train
    if train.batch_size_schedule is not None and train.max_steps is None:
        raise ConfigError("with a batch_size_schedule, epochs say too little about the number of steps; give --max_steps N")
    if train.batch_size_schedule is not None and (recipe.parallel.deepspeed or recipe.parallel.mode == "deepspeed"):
        raise ConfigError("deepspeed has a fixed number of forward passes a step; leave out batch_size_schedule or deepspeed")
    if lengths and data.tokenizer is None:
        raise ConfigError("seq_len_schedule cuts rows of text, and this data has none; leave it out")
    if bad := [length for _, length in lengths or () if data.seq_len % length]:
        raise ConfigError(f"seq_len_schedule has rows of {bad[0]} tokens, which do not divide seq_len = {data.seq_len}; they may be "
                          f"{', '.join(map(str, divisors(data.seq_len)))}")  # fmt: skip


def resolve_precision(recipe: Recipe, model: Model, device: torch.device, console: Console) -> str:
    """fp32, bf16, fp16 or fp8; a quick probe only verifies a choice that was made for the user."""
    width = model.width
    chosen = precision.resolve(recipe.train.precision, device, width)
    if recipe.train.precision == "auto" and chosen == "bf16" and device.type == "cpu":
        gain = precision.probe(width)
        if gain < PROBE_WARNS_BELOW:
            console.warn(f"bf16 products are {gain:.2f}x as fast as fp32 on this machine just now; "
                         "--precision fp32 may be faster")  # fmt: skip
    return chosen


def layout_allowed(precision: str, mode: str) -> bool:
    """Whether a number format goes with a way of running in parallel: none, ddp, fsdp or deepspeed."""
    return precision != "fp8" or mode in ("none", "ddp")


def check_layout(precision: str, mode: str) -> None:
    """ConfigError for a number format that weights in parts cannot have. mode: none, ddp, fsdp or deepspeed."""
    if not layout_allowed(precision, mode):
        raise ConfigError(f"fp8 works on one GPU and with --parallel ddp; {mode} keeps weights in parts: use --precision bf16")


def check_data(fingerprint: str, data: Dataset) -> None:
    """ConfigError for other data than a run was started with."""
    if fingerprint != data.fingerprint():
        what = data.difference(fingerprint) or "other text, tokenizer, packing or row length"
        raise ConfigError(f"the data is not what this run was started with ({what}). Start a new run with --fresh, or go on with it: "
                          "--allow-change data")  # fmt: skip
    if unknown := data.without_fingerprint():
        raise ConfigError(f"whether {', '.join(unknown)} still does what it did when this run was started cannot be told (no source of it "
                          "can be had): put it into a file, or give it a version=, for the next run; go on with it here: --allow-change data")  # fmt: skip


def check_metrics(recipe: Recipe, objective: Objective, model: Model, held_out: Dataset | None) -> None:
    """ConfigError for the name of a metric that the objective does not have, and for a target that nobody reaches honestly."""
    known = objective.metrics
    for key, name in (("checkpoint.metric_for_best_model", recipe.checkpoint.metric_for_best_model),
                      ("eval.early_stopping_metric", recipe.eval.early_stopping_metric)):  # fmt: skip
        if name not in known and not name.startswith("loss_"):
            raise ConfigError(f"{key} = {name!r}: {nearest(name, list(known))} (the metrics of this objective)")
    target, lowest = recipe.eval.target_loss, objective.lowest_loss(model, held_out) if held_out is not None else None
    if target is not None and lowest is not None and target < lowest[0]:
        raise ConfigError(f"eval.target_loss = {target} lies below {lowest[0]:.4f}, the honest floor: {lowest[1]}. A run that got there "
                          f"would have been told the answers; give --target_loss {lowest[0] + 0.01:.2f} or more")  # fmt: skip


def settle(
    recipe: Recipe, plan: Schedule, model: Model, data: Dataset, objective: Objective, device: torch.device, world: World,
    console: Console,
) -> str:  # fmt: skip
    """Writes what was resolved into the recipe, so that the run's config.toml says it and a resumed run keeps it; marks the
    blocks that recompute or are compiled. Returns the number format. ConfigError for fp8 where no layer can have it."""
    chosen = world.on_main_first(lambda: resolve_precision(recipe, model, device, console))
    recipe.arch = MODELS.name_of(type(model), recipe.arch)
    recipe.model = model.config.model_dump()
    recipe.data.dataset_class = type(data).name or DATASETS.name_of(type(data), recipe.data.dataset_class)
    if recipe.distill.stage is None:
        recipe.train.objective = OBJECTIVES.name_of(type(objective), recipe.train.objective)
    for task in (getattr(data, "task", None), getattr(objective, "task", None)):
        recipe.task |= task.model_dump() if isinstance(task, Settings) else {}
    recipe.train.precision = chosen  # type: ignore[assignment]
    recipe.train.global_batch_size = plan.global_batch
    set_checkpointing(model, recipe.train.gradient_checkpointing)
    if chosen == "fp8" and not use_fp8(model):
        raise ConfigError("precision = fp8, and this model's blocks have no plain linear layer whose widths are multiples of 16 "
                          "(adapters, ternary and recurrent layers keep their own products); use --precision bf16")
    if recipe.train.torch_compile is True:
        compile_blocks(model)
    return chosen


def set_checkpointing(model: Model, wanted: bool | int | list[int]) -> None:
    """Marks the blocks that recompute their activations: none, all, every n-th, or those listed. ConfigError for a
    block that is not there."""
    blocks = model.blocks()
    if isinstance(wanted, list):
        outside = [n for n in wanted if not 0 <= n < len(blocks)]
        if outside:
            raise ConfigError(f"gradient_checkpointing names block {outside[0]}; there are 0 to {len(blocks) - 1}")
        chosen = set(wanted)
    elif isinstance(wanted, bool):
        chosen = set(range(len(blocks))) if wanted else set()
    else:
        chosen = set(range(0, len(blocks), wanted))
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = index in chosen  # type: ignore[assignment]


def use_fp8(model: Model) -> int:
    """Makes nn.Linear in the model's blocks Fp8Linear, where both widths are multiples of 16 and its rules call the weight a matrix of
    products (routers decide, and stay); names and parameters stay. How many there are now."""
    rules, names = model.parameter_rules(), {id(p): name for name, p in model.named_parameters()}
    for layer in (module for block in model.blocks() for module in block.modules()):
        if type(layer) is nn.Linear and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0:
            name = names.get(id(layer.weight), "")
            if "router" not in name and (name not in rules or rules[name].matrix):
                layer.__class__ = Fp8Linear
    return sum(isinstance(module, Fp8Linear) for module in model.modules())


def compile_blocks(model: Model) -> None:
    """torch.compile of each block; what cannot compile says so at the mock step."""
    for block in model.blocks():
        block.compile()
