"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treadle.errors import ConfigError

COLDEST = 1e-6  # a temperature below draws the likeliest token anyway, and logits divided by 1e-40 are no numbers any more


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 (and any below 1e-6) is greedy, top_k 0 and top_p 1 turn those limits off."""

    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0 <= self.temperature < float("inf"), ">= 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, ">= 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1] (1 is off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "> 0 (1 is off)"),
        )
        for name, good, allowed in rules:
            if not good:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be {allowed}")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)


NEW_TOKENS = 100


def generator_of(seed: int) -> torch.Generator:
    """What draws for this seed; ConfigError for one beyond 64 bits."""
    check_seed(seed)
    return torch.Generator().manual_seed(seed)


def check_seed(seed: int) -> None:
    """ConfigError for a seed that is no whole number within 64 bits, with a sign or without."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(1 << 63) <= seed < 1 << 64:
        raise ConfigError(f"seed = {seed!r}: give a whole number that fits 64 bits")


def typed_over(stored: dict[str, Any], typed: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """(keys of Sampling, max_new_tokens): what was typed (not None), else what a checkpoint stores, else the defaults."""
    given = {**stored, **{name: value for name, value in typed.items() if value is not None}}
    count = given.pop("max_new_tokens", NEW_TOKENS)
    return given, count


def stored_defaults(table: dict[str, Any], place: str) -> dict[str, Any]:
    """The keys of a generation_config.json that are ours; the format's other keys are left alone. ConfigError for values of
    another kind."""
    kinds = {"max_new_tokens": int, "temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}
    found = {}
    for name, kind in kinds.items():
        value = table.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
            raise ConfigError(f"{place}: {name} = {value!r} is no {'whole ' if kind is int else ''}number")
        found[name] = kind(value)
    if table.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def penalised(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """logits [B, V] in fp32; those of seen tokens (bool [B, V]; needed by a penalty other than 1 alone) divided by the penalty
    where positive and multiplied by it where negative (Keskar et al. 2019, arXiv 1909.05858)."""
    logits = logits.float()
    if penalty == 1 or seen is None:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _limited(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor] | None:
    """(weights [B, K] of the likeliest tokens, zero where they are cut off, and their ids); None where all may be drawn."""
    count = logits.shape[-1]
    limited = 0 < sampling.top_k < count
    if not limited and sampling.top_p == 1:
        return None
    ordered, index = logits.topk(sampling.top_k if limited else count, -1)  # likeliest first
    share = ordered.softmax(-1)
    if sampling.top_p < 1:
        share = share.masked_fill(share.cumsum(-1) - share >= sampling.top_p, 0.0)  # the set before a token is already enough
    return share, index


def _drawn(weights: Tensor, generators: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """One index [B, 1] for each row of weights [B, K], from one generator, or each row from its own as it would be alone."""
    weights = weights.cpu()
    if isinstance(generators, torch.Generator):
        return torch.multinomial(weights, 1, generator=generators)
    # The least of exponential times with rates w is each one with probability w / sum: what multinomial computes for one draw.
    times = torch.empty_like(weights)
    for row, generator in zip(times, generators):
        row.exponential_(generator=generator)
    return (weights / times).argmax(-1, keepdim=True)


def next_ids(logits: Tensor, seen: Tensor | None, sampling: Sampling, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """logits [B, V], seen: bool [B, V] (tokens that occurred), -> ids [B]. generator: of all rows, or one of each.

    First the repetition penalty; then temperature, top-k, and the smallest set of probability top_p (Holtzman et al. 2020,
    1904.09751).
    """
    logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    limited = _limited(logits, sampling)
    if limited is None:
        return _drawn(logits.softmax(-1), generator)[:, 0].to(logits.device)
    share, index = limited
    drawn = _drawn(share, generator).to(logits.device)
    return index.gather(-1, drawn)[:, 0]


def probabilities(logits: Tensor, seen: Tensor | None, sampling: Sampling) -> Tensor:
    """What `next_ids` draws from, [B, V]; greedily all of it lies on one token."""
    logits = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    limited = _limited(logits, sampling)
    if limited is None:
        return logits.softmax(-1)
    share, index = limited
    return torch.zeros_like(logits).scatter_(-1, index, share / share.sum(-1, keepdim=True))
