"""From logits to the next symbol."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How symbols are drawn; temperature 0 is greedy, top_k 0 and top_p 1 turn those limits off."""

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


def next_ids(logits: Tensor, seen: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits [B, V], seen: bool [B, V] (symbols that occurred), -> ids [B].

    The repetition penalty divides positive and multiplies negative logits of seen symbols (Keskar et al. 2019, arXiv
    1909.05858); then temperature, top-k, and the smallest set of probability top_p (Holtzman et al. 2020, 1904.09751).
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        scaled = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, scaled, logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    count = logits.shape[-1]
    limited = 0 < sampling.top_k < count
    if not limited and sampling.top_p == 1:
        return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
    ordered, index = logits.topk(sampling.top_k if limited else count, -1)  # likeliest first
    share = ordered.softmax(-1)
    if sampling.top_p < 1:
        share = share.masked_fill(share.cumsum(-1) - share >= sampling.top_p, 0.0)  # the set before a symbol is already enough
    drawn = torch.multinomial(share.cpu(), 1, generator=generator).to(logits.device)
    return index.gather(-1, drawn)[:, 0]
