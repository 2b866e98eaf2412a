"""Several tokens a step: something cheap proposes them, the model reads them all at once and keeps those it would have written.

Exact: greedily the same tokens, else the same distribution (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
2302.01318). A token x drawn from q is kept with probability min(1, p(x) / q(x)), p being what the model samples from; at the
first that is not, one is drawn from max(p - q, 0) instead, and after the last, one from p.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from treadle.data.batch import Batch
from treadle.errors import ConfigError
from treadle.generation.decoding import Decoding
from treadle.generation.sampling import Sampling, probabilities

LONGEST_MATCH, SHORTEST_MATCH = 4, 2  # tokens at the end that have to have occurred before
MOST, FIRST = 8, 4  # tokens proposed at once: at most, and at the start


class Proposer(Protocol):
    """What guesses the next tokens of a single row."""

    def propose(self, ids: list[int], count: int) -> tuple[list[int], list[Tensor] | None]:
        """The row so far -> at most `count` tokens, and the distribution [V] that each was drawn from (None: they were
        certain)."""

    def settle(self, kept: int) -> None:
        """Of the proposed tokens the first `kept` became part of the row, and one more that was not proposed came after."""


class NGrams:
    """What followed the row's last tokens where they occurred before (prompt lookup): no model, so it costs nothing."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens -> the place behind their latest occurrence
        self._known = 0

    def propose(self, ids: list[int], count: int) -> tuple[list[int], list[Tensor] | None]:
        """Up to `count` tokens that followed the same ones before; no distributions [V], since nothing was drawn."""
        for end in range(self._known, len(ids)):  # occurrences that something follows
            for length in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
                if end >= length:
                    self._after[tuple(ids[end - length : end])] = end
        self._known = len(ids)
        for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            place = self._after.get(tuple(ids[-length:])) if len(ids) >= length else None
            if place is not None:
                return [ids[place + i % (len(ids) - place)] for i in range(count)], None  # what repeats may go on repeating
        return [], None

    def settle(self, kept: int) -> None:
        """Nothing to do: the tokens themselves are looked through."""


class Draft:
    """A smaller model with the same tokens."""

    def __init__(self, decoding: Decoding, sampling: Sampling, generator: torch.Generator) -> None:
        self.decoding, self.sampling, self.generator = decoding, sampling, generator
        self._read = 0  # tokens of the row that it has seen
        self._given = 0  # since `begin`: tokens of the row, then proposed ones

    def propose(self, ids: list[int], count: int) -> tuple[list[int], list[Tensor] | None]:
        """`count` tokens of the smaller model, and the distribution [V] that each was drawn from (None: greedily)."""
        device = self.decoding.model.device
        if self._read == 0:  # a prompt and the first token after it
            self.decoding.prompt(Batch.from_ids(torch.tensor(ids[:-1])[None]).to(device))
            self._read = len(ids) - 1
        self.decoding.begin()
        fresh = ids[self._read :]
        self._given = len(fresh)
        seen = seen_of(ids, self.decoding.model.vocab_size, device) if self.sampling.repetition_penalty != 1 else None
        logits = self.decoding.several(torch.tensor(fresh, device=device))[-1:]
        tokens: list[int] = []
        drawn_from: list[Tensor] = []
        while len(tokens) < count:
            share = probabilities(logits, seen, self.sampling)
            tokens.append(draw(share[0], self.generator))
            drawn_from.append(share[0])
            if len(tokens) < count:
                logits = self.decoding.several(torch.tensor(tokens[-1:], device=device))
                if seen is not None:
                    seen[0, tokens[-1]] = True
        self._read += len(fresh)
        return tokens, None if self.sampling.temperature == 0 else drawn_from

    def settle(self, kept: int) -> None:
        """The last of the proposed tokens was never read."""
        proposed = sum(part.shape[0] for part in self.decoding._read) - self._given
        stay = min(kept, proposed)
        self.decoding.keep(self._given + stay)
        self._read += stay


def draw(share: Tensor, generator: torch.Generator) -> int:
    """A token from its distribution [V]."""
    return int(torch.multinomial(share.float().cpu(), 1, generator=generator))


def seen_of(ids: list[int], vocabulary: int, device: torch.device) -> Tensor:
    """bool [1, V]: the tokens that occurred."""
    seen = torch.zeros(1, vocabulary, dtype=torch.bool, device=device)
    seen[0, torch.tensor(ids, device=device)] = True
    return seen


def judged(
    tokens: list[int], drawn_from: list[Tensor] | None, logits: Tensor, seen: Tensor | None, sampling: Sampling,
    generator: torch.Generator,
) -> tuple[int, int]:  # fmt: skip
    """Proposed tokens, logits [T + 1, V] of the model before and after each -> (how many are kept, the token after them)."""
    if sampling.temperature == 0 and seen is None:
        best = logits.argmax(-1).tolist()
        kept = next((place for place, token in enumerate(tokens) if token != best[place]), len(tokens))
        return kept, best[kept]
    shares = probabilities(logits, None, sampling) if seen is None else None
    for place, token in enumerate(tokens):
        share = shares[place] if shares is not None else probabilities(logits[place : place + 1], seen, sampling)[0]
        guess = None if drawn_from is None else drawn_from[place]
        odds = float(share[token]) / (1.0 if guess is None else float(guess[token]))
        if odds < 1 and float(torch.rand((), generator=generator)) >= odds:
            left = share.clone()
            if guess is None:
                left[token] = 0.0
            else:
                left = (left - guess).clamp_min_(0.0)
            return place, draw(left if float(left.sum()) > 0 else share, generator)
        if seen is not None:
            seen[0, token] = True
    last = shares[-1] if shares is not None else probabilities(logits[-1:], seen, sampling)[0]
    return len(tokens), draw(last, generator)


def speculated(
    decoding: Decoding, prompt: Tensor, count: int, sampling: Sampling, generator: torch.Generator, proposer: Proposer,
    statistics: dict[str, int] | None = None,
) -> Iterator[int]:  # fmt: skip
    """The tokens that follow a prompt [1, T], one at a time. statistics: gets steps, proposed and kept, summed up.
    ConfigError for several rows."""
    if prompt.shape[0] != 1:
        raise ConfigError(f"speculation reads one row at a time, not {prompt.shape[0]}; leave it out, or give one prompt")
    device, vocabulary = decoding.model.device, decoding.model.vocab_size
    ids: list[int] = prompt[0].tolist()
    penalised = sampling.repetition_penalty != 1
    tally = statistics if statistics is not None else {}
    seen = seen_of(ids, vocabulary, device) if penalised else None
    logits = decoding.prompt(Batch.from_ids(prompt).to(device))
    ids.append(draw(probabilities(logits, seen, sampling)[0], generator))
    yield ids[-1]
    written, ahead = 1, FIRST
    while written < count:
        tokens, drawn_from = proposer.propose(ids, min(ahead, count - written - 1)) if count - written > 1 else ([], None)
        decoding.begin()
        logits = decoding.several(torch.tensor([ids[-1], *tokens], device=device))
        seen = seen_of(ids, vocabulary, device) if penalised else None
        kept, after = judged(tokens, drawn_from, logits, seen, sampling, generator)
        decoding.keep(1 + kept)
        if tokens:
            proposer.settle(kept)
            ahead = min(MOST, ahead + 2) if kept == len(tokens) else max(1, kept + 1)
        for name, value in (("steps", 1), ("proposed", len(tokens)), ("kept", kept)):
            tally[name] = tally.get(name, 0) + value
        for token in (*tokens[:kept], after):
            ids.append(token)
            written += 1
            yield token
