"""What `treadle plan` answers: a plan of a recipe, the table of sizes (--table), or what fits (--recommend)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from treadle.errors import ConfigError
from treadle.models.base import count_label
from treadle.ops import precision as number_formats
from treadle.planning import tables
from treadle.planning.plan import checked_number, parse_bytes
from treadle.planning.plan import plan as make_plan
from treadle.planning.recommend import Fit, what_fits
from treadle.training.config import Recipe

FLAGS = ("world", "memory", "flops", "bandwidth", "overlap", "rehearse", "json", "exact", "recommend", "table", "inference",
         "gpu", "utilisation", "utilization", "measure", "tokens", "hours")  # fmt: skip
SWITCHES = ("rehearse", "json", "exact", "recommend", "table", "inference", "measure")
LENGTHS = (1024, 512, 256, 128, 64)  # tried in this order where none was asked for


def answer(recipe: Recipe, given: Mapping[str, Any], target: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """The numbers and the same for people. given: the verb's own flags, as typed. ConfigError for flags that contradict
    each other."""
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
        return _recommended(recipe, own.get("memory"), not switched.get("inference"), target)
    device = "cpu" if recipe.run.device == "auto" and "flops" not in own else recipe.run.device
    own.update({name: switched.get(name, False) for name in ("rehearse", "exact", "inference", "measure")})
    result = make_plan(recipe, device="cuda" if device == "auto" else device, text_named=target is not None, **own)
    return result, tables.lines(result)


def switch(name: str, value: Any) -> bool:
    """Whether a flag without a value is on; ConfigError for any other word."""
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        raise ConfigError(f"--{name} {value}: --{name} stands alone, or with true or false")
    return text in ("true", "1", "yes")


def _asked(recipe: Recipe, key: str, target: str | None) -> bool:
    """Somebody said this value: a flag, or the file that was named (without one the built-in recipe stands there)."""
    origin = recipe.origins.get(key, "default")
    return origin == "flag" or (target is not None and origin == Path(target).with_suffix(".toml").name) or origin == target


def _kind(recipe: Recipe, otherwise: str) -> str:
    device = recipe.run.device
    return otherwise if device == "auto" else "cuda" if device.startswith("cuda") else "cpu"


def _recommended(recipe: Recipe, memory: Any, training: bool, target: str | None) -> tuple[dict[str, Any], list[str]]:
    if memory is None:
        raise ConfigError("--recommend needs a memory to fill: treadle plan --memory 12GiB --recommend")
    room, unit = parse_bytes(memory)
    kind = _kind(recipe, "cuda" if torch.cuda.is_available() else "cpu")
    lengths = (recipe.data.seq_len,) if _asked(recipe, "data.seq_len", target) else LENGTHS
    asked = recipe.train.precision
    if kind == "cpu":
        precisions: tuple[str, ...] = (number_formats.resolve(asked, torch.device("cpu"), 1024),)
    else:
        precisions = ("bf16", "fp32") if asked == "auto" else (asked,)
    again = recipe.train.gradient_checkpointing if _asked(recipe, "train.gradient_checkpointing", target) else None
    if again is not None and not isinstance(again, bool):
        raise ConfigError(f"gradient_checkpointing = {again}: --recommend tries true and false; leave it out, or give one of them")
    name = (recipe.preset or "").lower().replace("-", "_") or None
    fit = what_fits(room / 1e9, recipe.arch, lengths, precisions, training=training, kind=kind, preset=name, checkpointing=again)
    return _numbers(fit, kind, room, target), _lines(fit, kind, room, unit, target)


def _numbers(fit: Fit, kind: str, room: float, target: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"keys": fit.keys, "parameters": fit.parameters, "rows": fit.rows, "total_gb": fit.total_gb, "memory_gb": room / 1e9,
                             "device": kind, "trains": fit.training}  # fmt: skip
    return {**found, "command": fit.command(target)} if fit.training else found


def _lines(fit: Fit, kind: str, room: float, unit: str, target: str | None) -> list[str]:
    where = "one GPU" if kind == "cuda" else "one process on a CPU (--device cuda: a GPU)"
    size = f"{fit.arch} {fit.preset}, {count_label(fit.parameters)} parameters"
    need = f"{fit.total_gb:.2f} of {room / 1e9:.2f} GB of {where}"
    if not fit.training:
        return [f"the largest preset that generates: {size}: {fit.rows} text(s) of {fit.seq_len} tokens at once, weights in fp32, {need}"]
    again = ", with gradient checkpointing" if fit.gradient_checkpointing else ""
    return [f"the largest preset that trains: {size}: {fit.rows} row(s) of {fit.seq_len} tokens at once in {fit.precision}{again}, {need}",
            f"type: {fit.command(target)}"]  # fmt: skip


