"""Are the contestants comparable? Checked before any timing."""

from __future__ import annotations

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
        if not one["losses"][-1] < one["losses"][0]:
            said.append(f"the loss of {name} does not fall: {one['losses'][0]:.3f} -> {one['losses'][-1]:.3f}")
    return said
