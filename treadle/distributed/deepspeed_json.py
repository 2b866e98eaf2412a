"""A DeepSpeed JSON file as configuration: what it supplies to a recipe, and what a recipe supplies to it.

DeepSpeed itself reads the file (zero_optimization, offloading, communication, ...). Batch, accumulation, optimiser,
schedule and precision have one owner, the recipe; the file supplies them where nothing explicit does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from treadle.errors import ConfigError

BATCH = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "optim.max_grad_norm",
}
OPTIMIZER = {"lr": "optim.learning_rate", "eps": "optim.adam_epsilon", "weight_decay": "optim.weight_decay"}
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
OWNED = (*BATCH, "optimizer", "scheduler", "bf16", "fp16")  # parts that the recipe fills in again


def read(path: str) -> dict[str, Any]:
    """The file as a table; ConfigError when it is missing or no JSON."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"parallel.deepspeed = {path!r} does not exist; give a DeepSpeed JSON file, or leave it out: "
                          "--parallel deepspeed writes one for ZeRO stage 2") from None  # fmt: skip
    except (OSError, ValueError) as problem:
        raise ConfigError(f"parallel.deepspeed = {path!r} cannot be read as JSON: {problem}") from None
    if not isinstance(table, dict):
        raise ConfigError(f"parallel.deepspeed = {path!r} holds no table")
    return table


def supplied(table: dict[str, Any], world: int) -> dict[str, Any]:
    """Dotted keys of the recipe that the file gives; "auto" gives nothing. ConfigError for what treadle cannot honour."""

    def given(value: Any) -> bool:
        return value is not None and value != "auto"

    keys: dict[str, Any] = {ours: table[theirs] for theirs, ours in BATCH.items() if given(table.get(theirs))}
    total, micro = keys.get("train.global_batch_size"), keys.get("train.per_device_train_batch_size")
    passes = keys.get("train.gradient_accumulation_steps")
    if isinstance(total, int) and isinstance(passes, int) and micro is None and total % (passes * world) == 0:
        keys["train.per_device_train_batch_size"] = total // (passes * world)
    if isinstance(total, int) and isinstance(micro, int) and isinstance(passes, int) and total != micro * passes * world:
        raise ConfigError(f"the DeepSpeed file says train_batch_size = {total}, but {micro} (micro) x {passes} "
                          f"(accumulation) x {world} process(es) = {micro * passes * world}")  # fmt: skip
    keys.update(_optimizer(table.get("optimizer"), given))
    keys.update(_schedule(table.get("scheduler"), given))
    kinds = {kind: table.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16")}
    if kinds["bf16"] is True and kinds["fp16"] is True:
        raise ConfigError("the DeepSpeed file enables bf16 and fp16; enable one")
    if "auto" not in kinds.values():
        keys["train.precision"] = next((kind for kind, on in kinds.items() if on), "fp32")
    return keys


def _optimizer(section: dict[str, Any] | None, given: Any) -> dict[str, Any]:
    if not section:
        return {}
    kind = str(section.get("type", "AdamW"))
    if kind.lower() not in ("adam", "adamw"):
        raise ConfigError(f"the DeepSpeed file asks for optimizer.type = {kind}; treadle hands its own AdamW to DeepSpeed: "
                          "use AdamW, or leave the optimizer out")  # fmt: skip
    values = section.get("params", {})
    keys = {"optim.name": "adamw", **{ours: values[theirs] for theirs, ours in OPTIMIZER.items() if given(values.get(theirs))}}
    if given(values.get("betas")):
        keys["optim.adam_beta1"], keys["optim.adam_beta2"] = values["betas"]
    return keys


def _schedule(section: dict[str, Any] | None, given: Any) -> dict[str, Any]:
    if not section:
        return {}
    kind, values = str(section.get("type")), section.get("params", {})
    if kind not in SCHEDULES:
        raise ConfigError(f"the DeepSpeed file asks for scheduler.type = {kind}; treadle knows {', '.join(SCHEDULES)}: use "
                          "one of them, or leave it out and set --lr_scheduler_type")  # fmt: skip
    keys: dict[str, Any] = {"optim.lr_scheduler_type": SCHEDULES[kind]}
    named = {"warmup_num_steps": "optim.warmup_steps", "total_num_steps": "train.max_steps",
             "cos_min_ratio": "optim.min_lr_ratio", "warmup_max_lr": "optim.learning_rate"}  # fmt: skip
    keys.update({ours: values[theirs] for theirs, ours in named.items() if given(values.get(theirs))})
    return {"optim.min_lr_ratio": 0.0, **keys} if kind == "WarmupDecayLR" else keys


def complete(
    table: dict[str, Any] | None, *, micro: int, accumulation: int, world: int, precision: str, max_grad_norm: float
) -> dict[str, Any]:
    """What DeepSpeed is given: the file (or ZeRO stage 2 without one) with every owned part as the recipe has it."""
    whole: dict[str, Any] = dict(table) if table is not None else {"zero_optimization": {"stage": 2}}
    for name in ("optimizer", "scheduler"):  # treadle's own optimiser and schedule are handed over instead
        whole.pop(name, None)
    whole.update({
        "train_batch_size": micro * accumulation * world,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
    })  # fmt: skip
    for kind in ("bf16", "fp16"):
        section = whole.get(kind, {})
        if precision == kind or section:
            whole[kind] = {**section, "enabled": precision == kind}
    return whole
