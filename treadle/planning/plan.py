"""`treadle plan`: what a recipe needs on how many processes, on paper, before anything is started."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from treadle.data.base import BatchPlan, Dataset
from treadle.data.batch import Batch
from treadle.data.dataset import splits_of
from treadle.data.settings import TEXT
from treadle.distributed.choose import mode_for
from treadle.distributed.settings import ParallelSettings
from treadle.errors import ConfigError
from treadle.evaluation.report import objective_of
from treadle.generation.reading import checked, laid_out_bytes
from treadle.models.adapters import add_adapters
from treadle.models.base import Model, ModelConfig
from treadle.models.catalogue import MODELS
from treadle.objectives.base import Objective
from treadle.objectives.task import task_settings
from treadle.ops import precision as number_formats
from treadle.ops.memory import machine_bytes
from treadle.ops.peak import CAPABILITY
from treadle.planning import traffic
from treadle.planning.alternatives import alternatives
from treadle.planning.duration import UTILISATION, duration, flops_of_gpu, gpu_named, measured_flops, measured_seconds
from treadle.planning.memory import Memory, Sizes, per_process, to_read
from treadle.planning.step_trace import Shape, trace_reading, trace_step
from treadle.text.base import Tokenizer
from treadle.training import resolve
from treadle.training.config import Recipe

BANDWIDTH, OVERLAP = 10e9, 0.5  # stated with the result; --bandwidth and --overlap replace them
UNITS = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30,
         "tib": 2.0**40}  # fmt: skip
BYTES_FROM = 1e6  # a smaller number that is typed without its unit lacks one
LAYOUTS = {
    "one process": ("none", False),
    "ddp": ("ddp", False),
    "ddp, optimiser in shards": ("ddp", True),
    "deepspeed, zero stage 2": ("deepspeed", False),
    "fsdp": ("fsdp", False),
}


def parse_bytes(given: str | float) -> tuple[float, str]:
    """ "80GiB" -> (bytes, "GiB"), the unit spelled as usual; a number given from Python is bytes, a typed one only where it may be
    meant so. ConfigError for anything else."""
    text = f"{given}"
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(number) :].lower()
    try:
        if unit not in UNITS or not 0 < float(number) < float("inf"):
            raise ValueError
        if isinstance(given, str) and not unit and float(number) < BYTES_FROM:  # 12 are no bytes
            raise ValueError
        spelled = unit.upper().replace("IB", "iB").replace("KB", "kB")
        return float(number) * UNITS[unit], spelled if UNITS[unit] > 1 else "GB"
    except ValueError:
        raise ConfigError(f"{text!r} is no amount of memory; write a number with MB, GB, GiB, ...: 80GiB") from None


def checked_number(name: str, value: Any, kind: type = float, zero: bool = False) -> Any:
    """An assumption as a number, typed or given from Python; ConfigError for anything that is not above 0."""
    try:
        number = kind(value)
        if number != float(value) or not (0 < number < float("inf") or (zero and number == 0)):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        given = f"--{name} {value!r}" if isinstance(value, str) else f"{name} = {value!r}"
        whole = "whole number" if kind is int else "number"
        raise ConfigError(f"{given}: give a {whole} above 0") from None


def model_of(recipe: Recipe, data: Dataset | None = None, text_named: bool = False) -> tuple[type[Model], ModelConfig]:
    """The recipe's architecture and its keys. data: None for text, which is not read. The vocabulary is then the tokenizer's,
    as training would have it; a preset alone (text_named = False) keeps its own."""
    cls = MODELS.get(recipe.arch)
    follow = data.model_keys() if data is not None else {}
    keys = {key: value for key, value in follow.items() if key in cls.Config.model_fields} | recipe.model
    preset = cls.Config.presets().get((recipe.preset or "").lower().replace("-", "_"), {})
    if "vocab_size" in cls.Config.model_fields and "vocab_size" not in keys and (text_named or "vocab_size" not in preset):
        keys["vocab_size"] = _vocabulary(recipe)
    return cls, cls.Config.with_preset(recipe.preset, **keys)


def _vocabulary(recipe: Recipe) -> int:
    """Tokens of the tokenizer that is named, or at most of one that is to be made."""
    name = recipe.tokenizer.name
    if name == "byte" or Path(name).exists():
        return Tokenizer.load(name).vocab_size
    return recipe.tokenizer.vocab_size


def work_of(recipe: Recipe, data: Dataset | None, model: Model, micro: int) -> tuple[Objective, Batch, int]:
    """What a step does: the objective, a micro-batch of `micro` rows, and the length of a row."""
    objective = objective_of(recipe.tables())
    if data is None:
        return objective, type(model).example(model.config, micro, recipe.data.seq_len), recipe.data.seq_len
    objective.only_planned = True
    objective.prepare(model, data, torch.device("cpu"))
    micro_batches, _ = next(iter(data.batches(data.start, BatchPlan(recipe.run.seed, micro))))
    return objective, micro_batches[0], data.seq_len


def plan(
    recipe: Recipe, world: int | None = None, *, flops: float | None = None, bandwidth: float = BANDWIDTH,
    overlap: float = OVERLAP, memory: str | float | None = None, device: str = "cpu", rehearse: bool = False,
    exact: bool = False, inference: bool = False, gpu: str | None = None, utilisation: float = UTILISATION,
    measure: bool = False, tokens: float | None = None, hours: float | None = None, weights: str | None = None,
    model_class: tuple[type[Model], ModelConfig] | None = None, text_named: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Memory of one process by kind, bytes it sends in a step, and the estimated scaling: numbers, not strings.

    world: processes, default parallel.world_size, run.devices or 1; flops: operations a second that one device reaches
    (measured on this machine's CPU when left out); bandwidth: bytes a second between processes; overlap: the share of
    computing that communication hides behind; memory: what one process may take ("80GiB", or bytes), which "asked" then
    answers, with changes that would make it fit where it does not. rehearse runs a step of one of `world` processes over fake tensors. exact traces the whole model instead of two
    and three periods of its blocks; inference plans generating `micro-batch` texts of the row's length instead of training, from `weights` in a format.
    gpu: a GPU of ops/peak.py, which reaches `utilisation` of its data sheet; measure: run a micro-batch of one and two
    periods here and take its time. tokens or hours: a budget, from which "time" has the other. model_class: instead of the
    recipe's architecture. text_named: the vocabulary is the tokenizer's of that text, not a preset's. ConfigError for sizes that do not fit together.
    """
    if gpu is not None and (flops is not None or measure):
        raise ConfigError("--gpu, --flops and --measure each say how fast a device is; keep one")
    utilisation = checked_number("utilisation", utilisation)
    tokens = checked_number("tokens", tokens) if tokens is not None else None
    hours = checked_number("hours", hours) if hours is not None else None
    if gpu is not None:
        flops, device = flops_of_gpu(gpu, utilisation), "cuda"
        if recipe.train.precision == "fp8":
            number_formats.check_fp8(CAPABILITY[gpu_named(gpu)])
    if weights is not None and not inference:
        raise ConfigError(f"weights = {weights!r} is of generating; add --inference (training's number format: --precision)")
    weights = checked(weights)
    if world is None:
        world = recipe.parallel.world_size or recipe.run.devices or 1
    world = checked_number("world", world, int)
    flops = checked_number("flops", flops) if flops is not None else None
    bandwidth, overlap = checked_number("bandwidth", bandwidth), checked_number("overlap", overlap, zero=True)
    asked_for = parse_bytes(memory) if memory is not None else None
    data = None
    if recipe.data.dataset_class != TEXT:
        data = splits_of(recipe.data, recipe.tokenizer, task_settings(recipe.tables()), recipe.run.seed)["train"]
    cls, config = model_class or model_of(recipe, data, text_named)
    with torch.device("meta"):
        model = cls(config)
    whole = model.flops(recipe.data.seq_len if data is None else data.seq_len)
    adapter = recipe.adapter if recipe.adapter.lora_rank is not None else None
    if adapter is not None:
        add_adapters(model, adapter)
    sizes = Sizes.of(model)
    micro, accumulation, total = resolve.batch_sizes(recipe, world)
    kind = "cuda" if device.startswith("cuda") else "cpu"
    width = model.width
    asked: str = recipe.train.precision
    if kind == "cpu":
        asked = number_formats.resolve(asked, torch.device("cpu"), width)
    elif asked == "auto":
        asked = "bf16"
    objective, batch, length = work_of(recipe, data, model, micro)
    shape = Shape(micro, length, accumulation, asked, recipe.train.gradient_checkpointing)
    settings = recipe.parallel
    # Of a GPU that is not here nobody knows the memory; --memory says it.
    room = asked_for[0] if asked_for is not None else machine_bytes() / world if kind == "cpu" else math.inf
    mode = mode_for(settings, world, sizes.parameters, lambda: room)
    resolve.check_layout(asked, mode)
    if world == 1:
        mode = "none"
    shard_size = _checked_shard_size(settings, world)
    trace = trace_step(cls, config, objective, shape, batch, optim=recipe.optim, exact=exact, kind=kind, adapter=adapter)
    options: dict[str, Any] = {"reshard": settings.reshard_after_forward, "kind": kind,
                               "asynchronous": recipe.checkpoint.asynchronous}  # fmt: skip

    def needs_of(mode: str, shard_optimizer: bool) -> Memory:
        count = 1 if mode == "none" else world
        return per_process(sizes, trace, shape, mode, count, shard_size, shard_optimizer=shard_optimizer,
                           offload=settings.cpu_offload, **options)  # fmt: skip

    def volume(count: int) -> traffic.Traffic:
        parts = shard_size if shard_size is not None and count % shard_size == 0 else None
        return traffic.per_step(sizes, shape, mode, count, parts, reshard=settings.reshard_after_forward,
                                shard_optimizer=settings.shard_optimizer)  # fmt: skip

    # A product and its gradients by input and weight; of frozen weights there are none, of adapters all three.
    row_flops = 3.0 * whole if adapter is None else 2.0 * whole + 6.0 * sizes.trained * shape.length
    row_flops += objective.further_passes * whole
    rows_flops = row_flops * micro * accumulation
    if shape.gradient_checkpointing is not False:
        rows_flops *= 4 / 3  # one more forward pass
    if measure:
        flops_of_pass = rows_flops / accumulation
        reached = flops_of_pass / measured_seconds(cls, config, objective, shape, batch)
    else:
        reached = flops or measured_flops(width, asked if kind == "cpu" else "fp32")
    worlds = sorted({*(2**n for n in range(12) if 2**n <= world), world})
    curve = traffic.curve(worlds, rows_flops, micro * accumulation * shape.length, {w: volume(w).total for w in worlds},
                          reached, bandwidth, overlap)  # fmt: skip
    layouts = {name: needs_of(*layout) for name, layout in LAYOUTS.items() if resolve.layout_allowed(asked, layout[0])}
    every_token = row_flops / shape.length
    own_row = next(row for row in curve if row.world == world)
    sizes_of_steps = resolve.step_sizes(recipe.train.batch_size_schedule)
    time = duration(every_token, total * shape.length, own_row.step_seconds, tokens=tokens, hours=hours, step_sizes=sizes_of_steps)
    result: dict[str, Any] = {
        "architecture": cls.arch,
        "preset": recipe.preset,
        "parameters": sizes.parameters,
        "trained_parameters": sizes.trained,
        "flops_per_token": every_token,
        "world": world,
        "mode": mode,
        "precision": asked,
        "global_batch_size": total,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "seq_len": shape.length,
        "gradient_checkpointing": shape.gradient_checkpointing,
        "memory": needs_of(mode, settings.shard_optimizer).to_dict(),
        "layouts": {name: layout.total_gb for name, layout in layouts.items()},
        "ranks": {name: layout.to_dict() for name, layout in layouts.items()},
        "blocks": [{"parameters": own, "activations_gb": kept / 1e9} for own, kept in zip(sizes.blocks, trace.blocks)],
        "outside_blocks": sizes.root,
        "exact": trace.exact,
        "device": kind,
        "time": time.to_dict(),
        "traffic_gb": {**{k: v / 1e9 for k, v in asdict(volume(world)).items()}, "total": volume(world).total / 1e9},
        "scaling": [asdict(row) for row in curve],
        "assumptions": {"flops_per_second": reached, "flops_measured_here": flops is None, "step_measured_here": measure, "gpu": gpu,
                        "utilisation": utilisation if gpu is not None else None,
                        "bandwidth_bytes_per_second": bandwidth, "overlap": overlap},
    }  # fmt: skip
    if inference:
        read = trace_reading(cls, config, cls.example(config, micro, length), kind)
        result["weights"] = weights
        result["inference"] = to_read(sizes, model.state_bytes(micro, length), read, kind, laid_out_bytes(model, weights, kind))
    if asked_for is not None:
        limit, unit = asked_for
        need = result["inference" if inference else "memory"]["total_gb"] * 1e9
        result["asked"] = {"unit": unit, "memory": limit / UNITS[unit.lower()], "needs": need / UNITS[unit.lower()],
                           "fits": need <= limit}  # fmt: skip
        if need > limit:

            def needs(changed: Recipe, count: int, form: str) -> float:
                other = plan(changed, count, flops=1.0, device=device, inference=inference, weights=form if inference else None,
                             model_class=model_class, text_named=text_named)  # fmt: skip
                return float(other["inference" if inference else "memory"]["total_gb"]) * 1e9

            result["asked"]["tries"] = alternatives(recipe, result, limit, needs)
    if rehearse:
        from treadle.planning.rehearsal import rehearse as run

        fsdp = replace_mode(settings)
        counted = run(cls, config, objective, recipe.optim, fsdp, shape, world, batch, adapter)
        result["rehearsal_bytes"] = counted
    return result


def replace_mode(settings: ParallelSettings) -> ParallelSettings:
    """The same settings for fsdp, which is planned in the place of DeepSpeed."""
    return settings.model_copy(update={"mode": "fsdp", "deepspeed": None})


def _checked_shard_size(settings: ParallelSettings, world: int) -> int | None:
    size = settings.shard_size
    if size is not None and world % size:
        fits = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ConfigError(f"parallel.shard_size = {size} does not divide {world} processes; it may be {fits}")
    return size


