"""The next tokens of rows that have settings, seeds and histories of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from treadle.generation.sampling import Sampling, generator_of, next_ids


@dataclass(frozen=True)
class Token:
    """A token that was drawn. logprob: the logarithm of its probability by the raw logits (temperature 1, no limits, bias or
    penalty), and top: the likeliest tokens by it, likeliest first; NaN and nothing where the request asks for none."""

    id: int
    logprob: float = math.nan
    top: list[tuple[int, float]] = field(default_factory=list)


class Settings(Protocol):
    """What a request says of how its tokens are drawn; generation/engine.py documents each."""

    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    logprobs: int | None
    logit_bias: Mapping[int, float]


class Chooser:
    """What one row draws its tokens with."""

    def __init__(self, settings: Settings, vocabulary: int) -> None:
        self.sampling, self.logprobs = settings.sampling, settings.logprobs
        self.generator = generator_of(settings.seed) if self.sampling.temperature else torch.default_generator
        self.bias: Tensor | None = None
        if settings.logit_bias:
            self.bias = torch.zeros(vocabulary)
            self.bias[list(settings.logit_bias)] = torch.tensor(list(settings.logit_bias.values()), dtype=torch.float32)
        self.seen: Tensor | None = None
        if self.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(vocabulary, dtype=torch.bool)
            self.seen[settings.prompt_ids] = True

    @staticmethod
    def all(logits: Tensor, choosers: Sequence[Chooser]) -> list[Token | None]:
        """logits [N, V] -> a token of each row; None where they are not finite."""
        raw = logits.float()
        sound = torch.isfinite(raw.sum(-1)).tolist()
        biased = _biased(raw, choosers)
        groups: dict[Sampling, list[int]] = {}
        for number, chooser in enumerate(choosers):
            if sound[number]:
                groups.setdefault(chooser.sampling, []).append(number)
        chosen = [-1] * len(choosers)
        for sampling, numbers in groups.items():
            own = biased if len(numbers) == len(choosers) else biased[numbers]
            found = next_ids(own, _seen(choosers, numbers, own), sampling, [choosers[n].generator for n in numbers]).tolist()
            for number, token in zip(numbers, found):
                chosen[number] = token
                seen = choosers[number].seen
                if seen is not None:
                    seen[token] = True
        tokens = [Token(token) if good else None for token, good in zip(chosen, sound)]
        _report(raw, choosers, tokens)
        return tokens


def _biased(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    if all(chooser.bias is None for chooser in choosers):
        return logits
    logits = logits.clone()
    for number, chooser in enumerate(choosers):
        if chooser.bias is not None:
            logits[number] += chooser.bias.to(logits.device)
    return logits


def _seen(choosers: Sequence[Chooser], numbers: list[int], logits: Tensor) -> Tensor | None:
    rows = [seen for number in numbers if (seen := choosers[number].seen) is not None]
    return torch.stack(rows).to(logits.device) if rows else None  # rows of one group all have a penalty, or none has


def _report(logits: Tensor, choosers: Sequence[Chooser], tokens: list[Token | None]) -> None:
    """Puts the log-probabilities into the tokens of the rows that ask for them."""
    asking = [number for number, chooser in enumerate(choosers) if chooser.logprobs is not None and tokens[number] is not None]
    if not asking:
        return
    logprobs = logits[asking].log_softmax(-1)
    values, ids = (t.tolist() for t in logprobs.topk(max(choosers[number].logprobs or 0 for number in asking)))
    for place, number in enumerate(asking):
        token, count = tokens[number], choosers[number].logprobs or 0
        assert token is not None
        tokens[number] = Token(token.id, float(logprobs[place, token.id]), list(zip(ids[place], values[place]))[:count])
