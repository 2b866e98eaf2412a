"""What `treadle plan` answers: a plan of a recipe, the table of sizes (--table), or what fits (--recommend)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from treadle.errors import ConfigError
from treadle.models.base import ModelConfig, count_label
from treadle.naming import TYPED
from treadle.ops import precision as number_formats
from treadle.planning import tables
from treadle.planning.plan import checked_number, model_of, parse_bytes
from treadle.planning.plan import plan as make_plan
from treadle.planning.recommend import GLOBAL_BATCH, Asked, Fit, what_fits
from treadle.training.config import Recipe
from treadle.training.settings import OptimSettings

FLAGS = ("world", "memory", "flops", "bandwidth", "overlap", "rehearse", "json", "exact", "recommend", "table", "inference",
         "gpu", "utilisation", "utilization", "measure", "tokens", "hours", "weights")  # fmt: skip
SWITCHES = ("rehearse", "json", "exact", "recommend", "table", "inference", "measure")
LENGTHS = (1024, 512, 256, 128, 64)  # tried in this order where none was asked for

Compose = Callable[[Mapping[str, object]], Recipe]  # the recipe of the same command with further keys typed


def answer(
    recipe: Recipe, given: Mapping[str, Any], target: str | None, again: Compose, files: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """The numbers and the same for people. given: the verb's own flags, as typed; again, and the files that other flags name (--config):
    for --recommend. ConfigError for flags that contradict each other."""
    own = dict(given)
    switched = {name: switch(name, own.pop(name)) for name in SWITCHES if name in own}
    own.pop("json", None)
    if "utilization" in own:
        own["utilisation"] = own.pop("utilization")
    if "utilisation" in own and "gpu" not in own:
        raise ConfigError("--utilisation is a share of a GPU's data sheet; say which: --gpu H100 (or give --flops N)")
    for name in ("tokens", "hours"):
        if name in own:
            own[name] = checked_number(name, own[name])
    if switched.get("table"):
        table = tables.size_table(recipe.arch, recipe.data.seq_len if _asked(recipe, "data.seq_len", target) else 1024, kind=_kind(recipe, "cuda"))
        return table, tables.table_lines(table)
    if switched.get("recommend"):
        return _recommended(recipe, own, not switched.get("inference"), target, again, files)
    device = "cpu" if recipe.run.device == "auto" and "flops" not in own else recipe.run.device
    own.update({name: switched.get(name, False) for name in ("rehearse", "exact", "inference", "measure")})
    result = make_plan(recipe, device="cuda" if device == "auto" else device, text_named=target is not None or names_tokenizer(recipe), **own)
    return result, tables.lines(result)


def taken(flags: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the flags that are the plan's own, which leave `flags`: --weights is where it names a format, else it is the key
    data.weights, shares of several texts."""
    return {name: flags.pop(name) for name in names if name in flags and (name != "weights" or _is_format(flags[name]))}


def _is_format(value: Any) -> bool:
    return isinstance(value, str) and value[:1].isalpha()


def switch(name: str, value: Any) -> bool:
    """Whether a flag without a value is on; ConfigError for any other word."""
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise ConfigError(f"--{name} {value}: --{name} stands alone, or with true or false")
    return text in ("true", "1", "yes")


def _asked(recipe: Recipe, key: str, target: str | None) -> bool:
    """Somebody said this value: a flag, or the file that was named (without one the built-in recipe stands there)."""
    origin = _origin(recipe, key)
    return origin in TYPED or (target is not None and origin == Path(target).with_suffix(".toml").name) or origin == target


def names_tokenizer(recipe: Recipe, target: str | None = None) -> bool:
    """Whether somebody asked for a tokenizer, so that a preset's own vocabulary gives way to its."""
    return _asked(recipe, "tokenizer.name", target) or _asked(recipe, "tokenizer.vocab_size", target)


def _origin(recipe: Recipe, key: str) -> str:
    """Where the value is from, without the other name that it had there ("flag: batch_size")."""
    return recipe.origins.get(key, "default").partition(": ")[0]


def _kind(recipe: Recipe, otherwise: str) -> str:
    device = recipe.run.device
    return otherwise if device == "auto" else "cuda" if device.startswith("cuda") else "cpu"


def _recommended(
    recipe: Recipe, own: Mapping[str, Any], training: bool, target: str | None, again: Compose, files: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    if own.get("memory") is None:
        raise ConfigError("--recommend needs a memory to fill: treadle plan --memory 12GiB --recommend")
    others = sorted(own.keys() - {"memory"})
    others += ["parallel"] if recipe.parallel.mode not in ("auto", "none") else []
    others += ["deepspeed"] if recipe.parallel.deepspeed is not None else []
    others += ["world_size"] if (recipe.parallel.world_size or 1) > 1 else []
    others += ["devices"] if (recipe.run.devices or 1) > 1 else []
    if others:
        raise ConfigError(f"--recommend fills the memory of one process; leave out --{others[0]}")
    if recipe.adapter.lora_rank is not None:
        raise ConfigError("--recommend chooses a preset that trains from random weights; leave out --lora_rank")
    room, unit = parse_bytes(own["memory"])
    kind = _kind(recipe, "cuda" if torch.cuda.is_available() else "cpu")

    def said(key: str) -> bool:
        return _asked(recipe, key, target)

    lengths = (recipe.data.seq_len,) if said("data.seq_len") else LENGTHS
    precision = recipe.train.precision
    if kind == "cpu":
        precisions: tuple[str, ...] = (number_formats.resolve(precision, torch.device("cpu"), 1024),)
    else:
        precisions = ("bf16", "fp32") if precision == "auto" else (precision,)
    checkpointing = recipe.train.gradient_checkpointing if said("train.gradient_checkpointing") else None
    if checkpointing is not None and not isinstance(checkpointing, bool):
        raise ConfigError(f"gradient_checkpointing = {checkpointing}: --recommend tries true and false; leave it out, or give one of them")
    rows = recipe.train.per_device_train_batch_size if said("train.per_device_train_batch_size") else None
    total = recipe.train.global_batch_size if said("train.global_batch_size") else None
    passes = recipe.train.gradient_accumulation_steps if said("train.gradient_accumulation_steps") else None
    if passes is not None and rows is not None:
        total = passes * rows
    elif passes is not None:
        raise ConfigError("--recommend finds the rows of a pass, and the passes from the rows of a step; give --global_batch_size in the place of "
                          "--gradient_accumulation_steps, or --batch_size beside it")  # fmt: skip
    if total is None:
        total = GLOBAL_BATCH if rows is None or GLOBAL_BATCH % rows == 0 else rows

    named = target is not None or names_tokenizer(recipe)

    def composed(preset: str) -> tuple[ModelConfig, OptimSettings]:
        found = again({"model.arch": recipe.arch, "model.preset": preset})
        return model_of(found, text_named=named)[1], found.optim

    def needs(fit: Fit) -> float:
        whole = again(fit.typed_keys if fit.training else fit.keys)
        if not fit.training:
            whole.train = whole.train.model_copy(update={"per_device_train_batch_size": fit.rows, "global_batch_size": None})
        found = make_plan(whole, 1, flops=1.0, device=kind, inference=not fit.training, text_named=named)
        return float(found["memory" if fit.training else "inference"]["total_gb"])

    name = (recipe.preset or "").lower().replace("-", "_") or None
    fit = what_fits(room / 1e9, recipe.arch, lengths, precisions, training=training, kind=kind,
                    asked=Asked(name, checkpointing, rows, total, composed, needs))  # fmt: skip
    typed = {f"{section}.{key}": value for section, table in recipe.tables().items() for key, value in table.items()
             if _origin(recipe, f"{section}.{key}") in TYPED}  # fmt: skip
    command = fit.command(target, typed, files)
    return _numbers(fit, kind, room, command), _lines(fit, kind, room, unit, command)


def _numbers(fit: Fit, kind: str, room: float, command: str) -> dict[str, Any]:
    found: dict[str, Any] = {"keys": fit.keys, "parameters": fit.parameters, "rows": fit.rows, "total_gb": fit.total_gb, "memory_gb": room / 1e9,
                             "device": kind, "trains": fit.training}  # fmt: skip
    return {**found, "command": command} if fit.training else found


def _lines(fit: Fit, kind: str, room: float, unit: str, command: str) -> list[str]:
    where = "one GPU" if kind == "cuda" else "one process on a CPU (--device cuda: a GPU)"
    size = f"{fit.arch} {fit.preset}, {count_label(fit.parameters)} parameters"
    need = f"{fit.total_gb:.2f} of {room / 1e9:.2f} GB of {where}"
    if not fit.training:
        return [f"the largest preset that generates: {size}: {fit.rows} text(s) of {fit.seq_len} tokens at once, weights in fp32, {need}"]
    recomputed = ", with gradient checkpointing" if fit.gradient_checkpointing else ""
    return [f"the largest preset that trains: {size}: {fit.rows} row(s) of {fit.seq_len} tokens at once in {fit.precision}{recomputed}, {need}",
            f"type: {command}"]  # fmt: skip
