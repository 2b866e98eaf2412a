"""A model on its way through one generation: what stands behind the loops of decode.py and speculation.py."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from treadle.data.batch import Batch
from treadle.generation.steps import steps_of
from treadle.layers.quantized_linear import MANY_ROWS, may_round, rounded_products
from treadle.layers.state import KeyValueCache, State, advance_positions


class DecodableModel(Protocol):
    """What generation needs of a model; `models/base.py` documents each of these."""

    training: bool

    @property
    def vocab_size(self) -> int:
        """Logits of a position."""

    def heads(self) -> Any:
        """lm_head among them, by name."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""

    def hidden(self, batch: Batch, state: Any = None) -> Any:
        """An output with `hidden` [B, T, D] and `state`."""

    def new_state(self, batch_size: int, max_len: int) -> Any:
        """An empty decoding state."""

    def train(self, mode: bool = True) -> Any:
        """As nn.Module.train."""

    def eval(self) -> Any:
        """As nn.Module.eval."""


class Decoding:
    """The rows of one generation. Any model decodes through this; a faster way for some is in dense.py."""

    def __init__(self, model: DecodableModel, rows: int, max_len: int) -> None:
        self.model, self.head = model, model.heads()["lm_head"]
        self.state: Any = model.new_state(rows, max_len)
        self._steps = steps_of(model)
        self._may_round = may_round(model)
        self._before: Any = None  # the state at `begin`, where one cannot go back in it
        self._read: list[Tensor] = []  # tokens since then

    def prompt(self, batch: Batch) -> Tensor:
        """The prompts [B, T] -> logits [B, V] of what follows each row's last token."""
        many = batch.token_mask.sum(1) >= MANY_ROWS if self._may_round else None
        if many is None or bool(many.all()) or not bool(many.any()):
            with rounded_products(many is not None and bool(many.all())):
                logits, self.state = self._prompt(batch, self.state)
            return logits
        # Which products a prompt is read in depends on its own length alone, so these are two passes.
        parts = []
        for rounded in (True, False):
            rows = (many == rounded).nonzero()[:, 0].tolist()
            with rounded_products(rounded):
                made, state = self._prompt(_of_rows(batch, rows), self.state.select(rows))
            parts.append((rows, made, state))
        logits = parts[0][1].new_empty(batch.shape[0], parts[0][1].shape[1])
        for rows, made, state in parts:
            logits[rows] = made
            self.state.put(rows, state)
        return logits

    def _prompt(self, batch: Batch, state: Any) -> tuple[Tensor, Any]:
        out = self.model.hidden(batch, state)
        # Only the last token of each row is read: the head never sees the rest of the prompt.
        return self.head(_last_positions(out.hidden, batch.token_mask)), out.state

    def step(self, ids: Tensor, running: Tensor | None = None) -> Tensor:
        """One token a row, ids [B] -> logits [B, V] of what follows. running: the rows [N] that still matter; the others'
        logits mean nothing."""
        logits, self.state = self._steps(ids, self.state)
        return logits

    # ---- a single row, tentatively ----

    def begin(self) -> None:
        """From here on `keep` may go back."""
        rewinds = isinstance(self.state, State) and all(type(layer) is KeyValueCache for layer in self.state.layers)
        self._before, self._read = None if rewinds else self.state.clone(), []

    def several(self, ids: Tensor) -> Tensor:
        """Some tokens of the row at once, ids [T] -> logits [T, V] after each."""
        self._read.append(ids)
        return self._several(ids)

    def keep(self, count: int) -> None:
        """Of the tokens that `several` has read since `begin` the first `count` stay seen; the rest was never there."""
        ids = torch.cat(self._read)
        if count == ids.shape[0]:
            return
        if self._before is None:
            rewind(self.state, ids.shape[0] - count)
            return
        self.state = self._before
        if count:
            self._several(ids[:count])

    def _several(self, ids: Tensor) -> Tensor:
        count = ids.shape[0]
        batch = Batch(ids[None], segments=((count,),), position_ids=torch.arange(count, device=ids.device)[None])
        out = self.model.hidden(batch, self.state)
        self.state = out.state
        logits: Tensor = self.head(out.hidden[0])
        return logits


def rewind(state: State, tokens: int) -> None:
    """The last `tokens` positions of each row are free again: a cache of keys and values is read up to its length."""
    state.lengths = state.lengths - tokens
    state.host_lengths = [length - tokens for length in state.host_lengths]


def advance(state: State, token_mask: Tensor, counts: list[int]) -> None:
    """The rows have seen their tokens of a batch. token_mask bool [B, T]."""
    state.lengths = advance_positions(state.lengths, token_mask)[1]
    state.host_lengths = [length + count for length, count in zip(state.host_lengths, counts)]


def _of_rows(batch: Batch, rows: list[int]) -> Batch:
    """A prompt's rows of these numbers."""
    doc_ids = batch.doc_ids[rows] if batch.doc_ids is not None else None
    return Batch.from_ids(batch.input_ids[rows], doc_ids=doc_ids, extras={name: t[rows] for name, t in batch.extras.items()})


def _last_positions(hidden: Tensor, token_mask: Tensor) -> Tensor:
    length = hidden.shape[1]
    index = torch.arange(length, device=hidden.device)
    at = torch.where(token_mask, index, -1).amax(1).clamp_min(0)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), at]
