"""The rows that an engine decodes together: prompts are read beside them, join them, and leave when they have ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from treadle.data.batch import PAD, Batch
from treadle.generation.dense import DenseDecoding
from treadle.generation.reading import Reading
from treadle.generation.steps import steps_of
from treadle.layers.quantized_linear import MANY_ROWS, may_round, rounded_products
from treadle.layers.state import State

SLOTS = 128  # a state holds a multiple of so many tokens a row


@dataclass(eq=False)
class Place:
    """Where a request's row is kept. most: the tokens of its prompt and continuation; row: its number among the rows, which changes
    when others leave; state: its own while its prompt is read, where it has one; length: tokens seen;
    rounded: whether its prompt is read in products of bf16."""

    most: int
    row: int = -1
    state: State | None = None
    length: int = 0
    rounded: bool = False


class Slots(Protocol):
    """Rows of a model that are at different lengths. Every method is called by one thread at a time."""

    @property
    def nbytes(self) -> int:
        """Bytes of the decoding state."""

    def open(self, prompt_tokens: int, new_tokens: int) -> Place:
        """A place for a prompt of so many tokens and what follows it."""

    def read(self, place: Place, ids: list[int], extras: dict[str, Tensor]) -> Tensor:
        """Some more tokens of a prompt -> logits [1, V] after the last."""

    def read_together(self, places: list[Place], ids: list[list[int]]) -> Tensor | None:
        """The first tokens of several prompts -> logits [N, V] after each; None where that saves nothing. An error leaves the places
        as they were."""

    def join(self, places: list[Place]) -> None:
        """Prompts that have been read take part in `step` from here on. An error leaves the places that run as they were."""

    def step(self, places: list[Place], ids: list[int]) -> Tensor:
        """One token each -> logits [N, V] of what follows; the rows of other places stay as they are."""

    def close(self, places: list[Place]) -> None:
        """The places are free again, wherever their requests were."""


class AnySlots:
    """Rows of any model: one state of the rows that run, as long as the longest of them may get, into which others are put.

    A row that has ended stays in it, empty and padded, until another takes it, and the state is made smaller when more than half
    of it is empty: so a state of keys and values is not copied at each coming and going.
    """

    def __init__(self, ready: Reading, max_len: int) -> None:
        self.model, self.max_len = ready.model, max_len
        self.head, self._steps = self.model.heads()["lm_head"], steps_of(self.model)
        self._may_round = may_round(self.model)
        self.state: State | None = None
        self.places: list[Place | None] = []  # of the state's rows; None where a row is empty
        self._reading: list[Place] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all decoding states held now."""
        states = [self.state, *(place.state for place in self._reading)]
        return sum(state.nbytes for state in states if state is not None)

    def open(self, prompt_tokens: int, new_tokens: int) -> Place:
        """A place for a request of so many tokens; its prompt is not read yet."""
        place = Place(prompt_tokens + new_tokens, rounded=self._may_round and prompt_tokens >= MANY_ROWS)
        self._reading.append(place)
        return place

    def read(self, place: Place, ids: list[int], extras: dict[str, Tensor]) -> Tensor:
        """Reads part of a prompt: its ids, one row; returns the logits [V] behind the last of them."""
        if place.state is None:
            place.state = self.model.new_state(1, place.most)
        batch = Batch.from_ids(torch.tensor([ids]), extras=extras or None).to(self.model.device)
        with rounded_products(place.rounded):
            out = self.model.hidden(batch, place.state)
            logits: Tensor = self.head(out.hidden[:, -1])
        place.state = out.state
        place.length += len(ids)
        return logits

    def read_together(self, places: list[Place], ids: list[list[int]]) -> Tensor | None:
        """Reads whole prompts in one pass, padded: logits [B, V] behind each; None where that is not worth it or not exact."""
        if len({place.rounded for place in places}) > 1:
            return None
        count, lengths = len(places), [len(own) for own in ids]
        longest = max(lengths)
        given, doc_ids = torch.zeros(count, longest, dtype=torch.int64), torch.full((count, longest), PAD)
        for row, own in enumerate(ids):
            given[row, : len(own)], doc_ids[row, : len(own)] = torch.tensor(own), 0
        batch = Batch.from_ids(given, doc_ids=doc_ids if min(lengths) < longest else None).to(self.model.device)
        with rounded_products(places[0].rounded):
            out = self.model.hidden(batch, self.model.new_state(count, max(place.most for place in places)))
            logits: Tensor = self.head(out.hidden[range(count), [length - 1 for length in lengths]])
        for row, place in enumerate(places):
            place.state, place.length = out.state.select([row]), lengths[row]
        return logits

    def join(self, places: list[Place]) -> None:
        """The rows whose prompts are read take part in `step` from now on."""
        running = [place for place in self.places if place is not None]
        needed = -(-max(place.most for place in (*running, *places)) // SLOTS) * SLOTS
        free = [row for row, kept in enumerate(self.places) if kept is None]
        before, count = self.state, len(self.places)
        if before is None or len(free) < len(places) or needed > before.max_len:
            rows = count + max(0, len(places) - len(free))
            state = self.model.new_state(rows, needed if before is None else max(needed, before.max_len))
            if before is not None:
                state.put(range(count), before)
            self.state, free = state, free + list(range(count, rows))
            self.places += [None] * (rows - count)
        assert self.state is not None
        for place, row in zip(places, free):
            assert place.state is not None
            self.state.put([row], place.state)
            place.state, place.row, self.places[row] = None, row, place
            self._reading.remove(place)

    def step(self, places: list[Place], ids: list[int]) -> Tensor:
        """One token of each place: its logits [B, V], in the order of the places."""
        column = [0] * len(self.places)
        for place, token in zip(places, ids):
            column[place.row] = token
            place.length += 1
        given = torch.tensor(column, device=self.model.device)
        logits, self.state = self._steps(given, self.state, [place.row for place in places])
        return logits

    def close(self, places: list[Place]) -> None:
        """The places are free again."""
        ended = []
        for place in places:
            if place in self._reading:
                self._reading.remove(place)
            elif place.row >= 0:
                self.places[place.row] = None
                ended.append(place.row)
            place.state, place.row = None, -1
        kept = [row for row, place in enumerate(self.places) if place is not None]
        if not kept:
            self.state, self.places = None, []
        elif 2 * len(kept) <= len(self.places):
            assert self.state is not None
            self.state, self.places = self.state.select(kept), [self.places[row] for row in kept]
            for row, running in enumerate(self.places):
                assert running is not None
                running.row = row
        elif ended:  # a row that is not read any more must not count among the longest
            assert self.state is not None
            self.state.put(ended, self.model.new_state(len(ended), 1))


class DenseSlots:
    """Rows of a dense transformer in the compiled step: slots of one cache that is allocated once."""

    def __init__(self, ready: Reading, rows: int, max_len: int) -> None:
        decoding = ready.start(rows, max_len)
        assert isinstance(decoding, DenseDecoding)
        self.decoding, self.free = decoding, list(range(rows))[::-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the one cache."""
        return self.decoding.state.nbytes

    def open(self, prompt_tokens: int, new_tokens: int) -> Place:
        """A slot for a request of so many tokens."""
        return Place(prompt_tokens + new_tokens, row=self.free.pop(), rounded=self.decoding.rounds_a_prompt_of(prompt_tokens))

    def read(self, place: Place, ids: list[int], extras: dict[str, Tensor]) -> Tensor:
        """Reads part of a prompt: its ids, one row; returns the logits [V] behind the last of them."""
        logits = self.decoding.read(place.row, torch.tensor(ids), place.length, place.rounded)
        place.length += len(ids)
        return logits

    def read_together(self, places: list[Place], ids: list[list[int]]) -> Tensor | None:
        """None, as prompts [B, T] are read one by one here."""
        return None  # its products have one speed from a few tokens on

    def join(self, places: list[Place]) -> None:
        """Nothing to do: a slot takes part from its first token on."""

    def step(self, places: list[Place], ids: list[int]) -> Tensor:
        """One token of each place: its logits [B, V], in the order of the places."""
        rows, positions = [place.row for place in places], [place.length for place in places]
        logits = self.decoding.tokens(*torch.tensor([ids, rows, positions]))
        for place in places:
            place.length += 1
        return logits

    def close(self, places: list[Place]) -> None:
        """The slots are free again."""
        for place in places:
            self.free.append(place.row)
            place.row = -1


def slots_of(ready: Reading, rows: int, max_len: int, ordinary: bool = False) -> Any:
    """Slots for so many rows. ordinary: the model reads more than tokens."""
    return AnySlots(ready, max_len) if ready.form is None or ordinary else DenseSlots(ready, rows, max_len)
