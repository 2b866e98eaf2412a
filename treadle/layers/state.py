"""The decoding state of a model: one length per row and one entry per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from treadle.errors import ConfigError


@dataclass
class LayerState:
    """Base of a layer's decoding state: fields that are tensors have the batch as their first dimension."""

    slots_at: ClassVar[Mapping[str, int]] = MappingProxyType({})  # the dimension of max_len slots, of fields that have one

    def _each(self, change: Any) -> Any:
        return replace(
            self, **{f.name: change(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        )

    def select(self, rows: Tensor) -> Any:
        """The same state of these rows (int64 [B']), in this order; a row may come more than once."""
        return self._each(lambda t: t.index_select(0, rows))

    def clone(self) -> Any:
        """A copy that shares no memory."""
        return self._each(lambda t: t.clone())

    def joined(self, others: Sequence[Any]) -> Any:
        """These rows and then the others', in memory of their own."""
        made = {name: torch.cat([value, *(getattr(other, name) for other in others)]) for name, value in self._tensors()}
        return replace(self, **made)

    def put(self, rows: Tensor, other: Any, used: int) -> None:
        """Row i of `other` takes the place of row rows[i], in place; of its slots the first `used`. The rest becomes zeros: neighbours'
        lengths decide how far a row is read, and no weight of 0 hides a NaN that an earlier row left there."""
        for name, value in self._tensors():
            taken = getattr(other, name).to(value.dtype)
            at = self.slots_at.get(name)
            if at is not None:
                count = min(used, taken.shape[at] - 1)  # a ring that is full holds fewer tokens than were seen; the last slot takes padding
                value.narrow(at, count, value.shape[at] - count).index_fill_(0, rows, 0)
                value, taken = value.narrow(at, 0, count), taken.narrow(at, 0, count)
            value.index_copy_(0, rows, taken)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(f.name, v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(v.nbytes for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor))


@dataclass
class TokenPositions:
    """Positions of the tokens of one forward pass with a state. token_mask: bool [B, T], false on padding; position_ids,
    cache_slots: int64 [B, T]."""

    token_mask: Tensor
    position_ids: Tensor  # tokens of the row before this one; what a rotary or learned embedding sees
    cache_slots: Tensor  # where a cache keeps each token; padding goes to the spare slot behind the last


def advance_positions(lengths: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """lengths [B] (tokens so far), token_mask [B, T] -> (position ids [B, T], padding repeating the one before it; lengths
    afterwards [B])."""
    return lengths[:, None] + token_mask.cumsum(1) - 1, lengths + token_mask.sum(1)


@dataclass
class State:
    """The decoding state of a whole model. A passed state is consumed: go on with `out.state`.

    lengths: int64 [B] on the device, tokens seen (padding not counted). host_lengths: the same (or an upper bound) known on
    the host, so that no forward pass reads the device back.
    """

    lengths: Tensor
    host_lengths: list[int]
    max_len: int
    layers: list[Any]

    def token_positions(
        self, rows: int, length: int, doc_ids: Tensor | None, segments: tuple[tuple[int, ...], ...] | None
    ) -> TokenPositions:
        """The positions of a batch that follows what was seen; padding (doc_id -1) changes nothing. ConfigError when full."""
        if rows != len(self.host_lengths):
            raise ConfigError(f"the state has {len(self.host_lengths)} rows, the batch {rows}")
        device = self.lengths.device
        if doc_ids is None:
            token_mask = torch.ones(rows, length, dtype=torch.bool, device=device)
            fresh = [length] * rows
        else:
            token_mask = doc_ids >= 0
            fresh = [sum(r for r in row if r > 0) for row in segments] if segments is not None else [length] * rows
        longest = max(h + f for h, f in zip(self.host_lengths, fresh))
        if longest > self.max_len:
            raise ConfigError(f"the state holds {self.max_len} tokens per row, {longest} are needed; "
                              f"make it larger: new_state(batch_size, max_len={longest})")  # fmt: skip
        self.host_lengths = [h + f for h, f in zip(self.host_lengths, fresh)]
        if doc_ids is None and length == 1:  # a step of decoding: the same in three operations instead of nine
            positions, self.lengths = self.lengths[:, None], self.lengths + 1
            return TokenPositions(token_mask, positions, positions)
        positions, self.lengths = advance_positions(self.lengths, token_mask)
        cache_slots = torch.where(token_mask, positions, self.max_len)
        return TokenPositions(token_mask, positions.clamp_min(0), cache_slots)

    @property
    def used(self) -> int:
        """Slots that any row may have used; caches are read up to here."""
        return max(self.host_lengths, default=0)

    def select(self, rows: Sequence[int] | Tensor) -> State:
        """The state of some rows, in the given order."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        host = [self.host_lengths[i] for i in index.tolist()]
        index = index.to(self.lengths.device)
        return State(self.lengths[index], host, self.max_len, [layer.select(index) for layer in self.layers])

    def clone(self) -> State:
        """A copy that shares no memory, for going on twice from one place."""
        return State(self.lengths.clone(), list(self.host_lengths), self.max_len, [la.clone() for la in self.layers])

    def joined(self, *others: State) -> State:
        """These rows and then the others', in memory of their own, all of their slots. ConfigError where the states hold different numbers of
        tokens."""
        if any(other.max_len != self.max_len for other in others):
            raise ConfigError(f"states of {[self.max_len, *(o.max_len for o in others)]} tokens a row cannot be joined; make them with one max_len")
        host = [length for state in (self, *others) for length in state.host_lengths]
        layers = [layer.joined([other.layers[i] for other in others]) for i, layer in enumerate(self.layers)]
        return State(torch.cat([self.lengths, *(other.lengths for other in others)]), host, self.max_len, layers)

    def put(self, rows: Sequence[int], other: State) -> None:
        """Row i of `other` takes the place of row rows[i], in place. ConfigError where `other` has more slots a row than this."""
        if other.max_len > self.max_len or len(rows) != len(other.host_lengths):
            raise ConfigError(f"{len(rows)} rows of {self.max_len} tokens cannot take {len(other.host_lengths)} rows of {other.max_len}")
        index = torch.tensor(rows, dtype=torch.int64, device=self.lengths.device)
        self.lengths = self.lengths.index_copy(0, index, other.lengths)
        for row, length in zip(rows, other.host_lengths):
            self.host_lengths[row] = length
        for layer, of_other in zip(self.layers, other.layers):
            layer.put(index, of_other, other.used)

    @property
    def nbytes(self) -> int:
        """Bytes of the state of all layers."""
        return self.lengths.nbytes + sum(layer.nbytes for layer in self.layers)


@dataclass
class KeyValueCache(LayerState):
    """Keys and values [B, G, max_len + 1, E], allocated once; the slot behind the last takes padding and stays zero."""

    slots_at: ClassVar[Mapping[str, int]] = MappingProxyType({"keys": 2, "values": 2})
    keys: Tensor
    values: Tensor

    @staticmethod
    def empty(rows: int, groups: int, max_len: int, width: int, device: Any, dtype: Any) -> KeyValueCache:
        """Zeros for `max_len` tokens in each of `rows` rows: `groups` heads of keys and values, `width` numbers each."""
        shape = (rows, groups, max_len + 1, width)
        return KeyValueCache(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))

    def append(self, keys: Tensor, values: Tensor, token_positions: TokenPositions, used: int) -> tuple[Tensor, Tensor]:
        """Writes keys, values [B, G, T, E] into their slots; returns all keys and values in use, [B, G, used, E]."""
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        for cache, new in ((self.keys, keys), (self.values, values)):
            new = new.detach().transpose(1, 2) * token_positions.token_mask[:, :, None, None]
            cache.transpose(1, 2)[rows, token_positions.cache_slots] = new.to(cache.dtype)
        return self.keys[:, :, :used], self.values[:, :, :used]


@dataclass
class SlidingWindowCache(LayerState):
    """The last w rotated keys and values [B, G, w + 1, E], the last slot taking padding; count [B], tokens seen.

    A state for fewer tokens than the window has fewer slots; its ring never turns, so a token has the same slot in a larger one.
    """

    slots_at: ClassVar[Mapping[str, int]] = MappingProxyType({"keys": 2, "values": 2})
    keys: Tensor
    values: Tensor
    count: Tensor

    @staticmethod
    def fields(rows: int, groups: int, window: int, width: int, device: Any, dtype: Any) -> dict[str, Tensor]:
        """The fields of an empty cache of `window` positions, for the classes that have more of them."""
        made = (torch.zeros(rows, groups, window + 1, width, device=device, dtype=dtype) for _ in range(2))
        return {**dict(zip(("keys", "values"), made)), "count": torch.zeros(rows, dtype=torch.int64, device=device)}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, token_positions: TokenPositions, window: int, softcap: float | None = None
    ) -> Tensor:
        """Softmax over the ring and the new tokens, q [B, H, T, E], k and v [B, G, T, E]; then the ring takes the newest.
        softcap c: the scores s become c tanh(s / c)."""
        w, count = window, self.count[:, None]
        slots = torch.arange(w, device=q.device)
        old = count - 1 - (count - 1 - slots) % w  # [B, w]: the position that a slot holds, negative where it is empty
        new = torch.where(token_positions.token_mask, token_positions.position_ids, -1)
        held = torch.cat([old, new], 1)[:, None]  # [B, 1, w + T]
        now = token_positions.position_ids[:, :, None]
        seen = (held >= 0) & (held <= now) & (held > now - w)
        repeat = q.shape[1] // k.shape[1]
        keys, values = (
            expanded(torch.cat([ring[:, :, :w].to(t.dtype), t], 2), repeat) for ring, t in ((self.keys, k), (self.values, v))
        )
        scores = (q @ keys.transpose(-1, -2)) * q.shape[-1] ** -0.5
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min).softmax(-1)
        after = self.count + token_positions.token_mask.sum(1)
        stored = token_positions.token_mask & (token_positions.position_ids >= (after - w)[:, None])
        slots = torch.where(stored, token_positions.position_ids % w, w)
        rows = torch.arange(q.shape[0], device=q.device)[:, None]
        for ring, t in ((self.keys, k), (self.values, v)):
            new = t.detach().transpose(1, 2) * stored[:, :, None, None]
            ring.transpose(1, 2)[rows, slots] = new.to(ring.dtype)
        self.count = after
        return weights @ values


def expanded(t: Tensor, repeat: int) -> Tensor:
    """Groups [B, G, ...] repeated for their heads."""
    return t if repeat == 1 else t.repeat_interleave(repeat, dim=1)
