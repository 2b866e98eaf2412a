"""Are the contestants comparable? Checked before any timing."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from bench.peers.ours import our_model
from bench.peers.plain import PlainGPT
from bench.task import Task


def same_weights_same_loss(task: Task) -> float:
    """Relative difference of the loss of our model and the plain one with the same weights, in fp32."""
    from treadle.data.batch import Batch
    from treadle.objectives.next_token import NextToken

    plain, ours = PlainGPT(task), our_model(task)
    source, renamed = dict(plain.named_parameters()), {}
    for name, tensor in source.items():
        if ".qkv." in name:
            _, index, _, kind = name.split(".")
            for part, values in zip(("query", "key", "value"), tensor.split(task.width)):
                renamed[f"layers.{index}.attention.{part}.{kind}"] = values
            continue
        for old, new in (("blocks.", "layers."), (".norm1.", ".attention_norm."), (".norm2.", ".mlp_norm."),
                         (".out.", ".attention.out."), (".up.", ".mlp.up."), (".down.", ".mlp.down.")):  # fmt: skip
            name = name.replace(old, new)
        renamed[name] = tensor
    ours.load_weights(renamed)
    rows = torch.from_numpy(task.batch(task.data(), 0))
    ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    with torch.no_grad():
        theirs = float(plain(ids, labels))
        total = NextToken()(ours, Batch.from_ids(ids, labels=labels)).losses["next_token"].total
    return abs(float(total) / task.tokens_per_step / theirs - 1)


def problems(found: dict[str, dict[str, Any]]) -> list[str]:
    """What makes a comparison unfair, in words; empty when nothing does."""
    said, (reference, *others) = [], list(found)
    base = found[reference]
    for name in others:
        one = found[name]
        if abs(one["parameters"] / base["parameters"] - 1) > 0.01:
            said.append(f"{name} has {one['parameters']} parameters, {reference} {base['parameters']}")
        if one["tokens_per_step"] != base["tokens_per_step"]:
            said.append(f"{name} takes {one['tokens_per_step']} tokens a step, {reference} {base['tokens_per_step']}")
    for name, one in found.items():
        first, late = one["losses"][0], later_loss(one["losses"])
        if not late < first:
            said.append(f"the loss of {name} does not fall: {first:.3f} -> {late:.3f} (median of the second half)")
    return said


def later_loss(losses: list[float]) -> float:
    """The median of the second half: a step or two at which GPT-2's output changes its sign (README.md) do not count."""
    return statistics.median(losses[len(losses) // 2 :])


def remarks(found: dict[str, dict[str, Any]], rise: float = 1.0) -> list[str]:
    """Steps at which a loss rose by more than `rise` nats, in words: true losses, and no reason not to compare."""
    return [
        f"{name}: the loss rose from {before:.2f} to {after:.2f} at step {step}"
        for name, one in found.items()
        for step, (before, after) in enumerate(zip(one["losses"], one["losses"][1:]), 2)
        if not after - before <= rise
    ]
