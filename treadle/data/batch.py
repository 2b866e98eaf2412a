"""The one thing that crosses rooms: a batch of rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.data.shards import Row
from treadle.errors import ConfigError
from treadle.ops.documents import document_positions

IGNORE = -100  # a label nobody scores
PAD = -1  # the doc_id of padding


@dataclass
class Batch:
    """B rows of T positions.

    input_ids: int64 [B, T]. labels: int64 [B, T], the next token of the same document, -100 where there is none; None
    when nothing is scored. position_ids: int64 [B, T], restarting in each document. doc_ids: int64 [B, T], which
    document of its row a position belongs to, -1 for padding; None means one document a row and no padding.
    segments: for each row the lengths of its runs of equal doc_id, host-side integers made with the data (a negative
    length is padding), so that no model has to read doc_ids back from a device. extras: tensors of other tasks (targets,
    masks, what a decoder attends to), the rows first. counts: how many of each unit (labels, tokens, rows, documents, and
    what a dataset adds) there are, on the host: what losses are divided by.
    """

    input_ids: Tensor
    labels: Tensor | None = None
    position_ids: Tensor | None = None
    doc_ids: Tensor | None = None
    segments: tuple[tuple[int, ...], ...] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def from_ids(ids: Any, doc_ids: Any = None, labels: Any = None, extras: dict[str, Any] | None = None) -> Batch:
        """A batch from ids [B, T] or [T] (lists or tensors), where they are; without labels nothing is scored. extras: what else
        a task needs, by name, each with the rows as its first dimension. ConfigError for shapes that do not belong
        together."""
        input_ids = _integers("ids", ids)
        input_ids = input_ids[None] if input_ids.dim() == 1 else input_ids
        if input_ids.dim() != 2:
            raise ConfigError(f"ids must be [B, T] or [T], not {list(input_ids.shape)}")

        def like(name: str, given: Any) -> Tensor | None:
            if given is None:
                return None
            tensor = _integers(name, given)
            tensor = tensor[None] if tensor.dim() == 1 else tensor
            if tensor.shape != input_ids.shape:
                raise ConfigError(f"{name} is {list(tensor.shape)}, ids are {list(input_ids.shape)}")
            return tensor.to(input_ids.device)

        documents, aligned = like("doc_ids", doc_ids), like("labels", labels)
        rows, length = input_ids.shape
        if documents is None:
            positions = torch.arange(length, device=input_ids.device).expand(rows, length)
            segments: tuple[tuple[int, ...], ...] = tuple((length,) for _ in range(rows))
        else:
            segments = _segments(documents)
            positions = _positions(documents)
        named = {name: torch.as_tensor(value, device=input_ids.device) for name, value in (extras or {}).items()}
        for name, tensor in named.items():
            if tensor.dim() == 0 or tensor.shape[0] != rows:
                raise ConfigError(f"extras[{name!r}] is {list(tensor.shape)}; its first dimension must be the {rows} rows")
        batch = Batch(input_ids, aligned, positions, documents, segments, named)
        batch.counts = batch._count()
        return batch

    @staticmethod
    def for_training(ids: Any, doc_ids: Any = None) -> Batch:
        """`from_ids` with labels made by the shift: the next token of the same document, else -100."""
        batch = Batch.from_ids(ids, doc_ids)
        labels = torch.full_like(batch.input_ids, IGNORE)
        labels[:, :-1] = batch.input_ids[:, 1:]
        if batch.doc_ids is not None:
            other = batch.doc_ids[:, 1:] != batch.doc_ids[:, :-1]
            labels[:, :-1] = labels[:, :-1].masked_fill(other | (batch.doc_ids[:, :-1] == PAD), IGNORE)
        batch.labels = labels
        batch.counts = batch._count()
        return batch

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        rows, length = self.input_ids.shape
        return rows, length

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.input_ids.device

    def _count(self) -> dict[str, int]:
        """How many of each unit there are; on the host, once, when the batch is made."""
        _rows, _length = self.input_ids.shape
        scored = 0 if self.labels is None else int((self.labels != IGNORE).sum())
        runs = [run for row in self.segments or () for run in row if run > 0]
        real_rows = sum(any(run > 0 for run in row) for row in self.segments or ())
        return {"labels": scored, "tokens": sum(runs), "rows": real_rows, "documents": len(runs)}

    @property
    def token_mask(self) -> Tensor:
        """Bool [B, T], false on padding."""
        return torch.ones_like(self.input_ids, dtype=torch.bool) if self.doc_ids is None else self.doc_ids != PAD

    @property
    def is_unpacked(self) -> bool:
        """Every row is one document without padding, known on the host."""
        if self.segments is None:
            return self.doc_ids is None
        return all(len(row) == 1 and row[0] > 0 for row in self.segments)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch with its tensors on another device."""
        if self.input_ids.device == torch.device(device):
            return self
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin(self) -> Batch:
        """Page-locked, so that copies to a GPU do not block."""
        return self._each(lambda t: t.contiguous().pin_memory())  # an expanded tensor cannot be copied into

    def _each(self, change: Any) -> Batch:
        moved = {f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **moved, extras={name: change(t) for name, t in self.extras.items()})

    def cut(self, length: int) -> Batch:
        """Each row of T positions as T / length rows, whose documents begin anew. Labels stay as they are, so that each piece
        still learns what follows it. ConfigError where `length` does not divide T, or rows have more to them than text."""
        rows, whole = self.shape
        if length == whole:
            return self
        if whole % length or self.extras or self.segments is None:
            raise ConfigError(f"rows of {whole} positions{' of a task of their own' if self.extras else ''} cannot be cut into rows of {length}")
        segments = tuple(piece for runs in self.segments for piece in _cut_runs(runs, length))
        tensors = [None if t is None else t.reshape(-1, length) for t in (self.input_ids, self.labels, self.doc_ids)]
        documents = tensors[2]
        positions = torch.arange(length).expand(rows * whole // length, length) if documents is None else _positions(documents)
        cut = Batch(tensors[0], tensors[1], positions, documents, segments)  # type: ignore[arg-type]
        cut.counts = {**self.counts, **{name: n for name, n in cut._count().items() if name in ("rows", "documents")}}
        return cut

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop)."""
        part = self._each(lambda t: t[start:stop])
        part.segments = self.segments[start:stop] if self.segments is not None else None
        part.counts = part._count()
        return part


def _cut_runs(runs: tuple[int, ...], length: int) -> list[tuple[int, ...]]:
    """A row's runs (negative ones are padding), cut wherever a piece of `length` positions ends: those of each piece."""
    pieces: list[list[int]] = [[]]
    room = length
    for run in runs:
        left = abs(run)
        while left:
            if not room:
                pieces.append([])
                room = length
            part = min(left, room)
            pieces[-1].append(part if run > 0 else -part)
            left, room = left - part, room - part
    return [tuple(piece) for piece in pieces]


def _integers(name: str, given: Any) -> Tensor:
    tensor = torch.as_tensor(given)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise ConfigError(f"{name} are integers; targets of another kind go into extras, by name")
    return tensor.to(torch.int64)


def _segments(documents: Tensor) -> tuple[tuple[int, ...], ...]:
    """doc_ids [B, T] -> for each row the lengths of its runs of equal ids, negative for padding."""
    ids = documents.cpu().numpy()
    begins = np.ones_like(ids, dtype=bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    rows, columns = np.nonzero(begins)
    lengths = np.diff(np.flatnonzero(begins), append=ids.size)  # each row begins a run
    lengths = np.where(ids[rows, columns] == PAD, -lengths, lengths).tolist()
    bounds = np.searchsorted(rows, np.arange(len(ids) + 1)).tolist()
    return tuple(tuple(lengths[start:stop]) for start, stop in itertools.pairwise(bounds))


def _positions(doc_ids: Tensor) -> Tensor:
    """Positions restart where doc_ids change; 0 on padding."""
    return document_positions(doc_ids).masked_fill(doc_ids == PAD, 0)


def collate(rows: Sequence[Row | None], row_length: int) -> Batch:
    """Rows as a Batch [B, row_length]; None is a row of padding (a surplus draw). The label shift happens here only."""
    count = len(rows)
    ids = np.zeros((count, row_length), dtype=np.int64)
    labels = np.full((count, row_length), IGNORE, dtype=np.int64)
    positions = np.zeros((count, row_length), dtype=np.int64)
    documents = np.full((count, row_length), PAD, dtype=np.int64)
    segments: list[tuple[int, ...]] = []
    for r, row in enumerate(rows):
        at = 0
        for d, (start, length) in enumerate(zip(row.start.tolist(), row.length.tolist()) if row else ()):
            assert row is not None
            stream = row.shard.ids[start : start + length + 1]
            ids[r, at : at + length] = stream[:length]
            # The last token of a document predicts nothing: what follows it is another document.
            following = row.label_count(start, length)
            labels[r, at : at + following] = stream[1 : following + 1]
            if row.shard.learnt is not None:
                learnt = np.asarray(row.shard.learnt[start + 1 : start + 1 + following], dtype=bool)
                labels[r, at : at + following][~learnt] = IGNORE
            positions[r, at : at + length] = np.arange(length)
            documents[r, at : at + length] = d
            at += length
        runs = tuple(row.length.tolist()) if row else ()
        segments.append((*runs, at - row_length) if at < row_length else runs)
    tensors = [torch.from_numpy(array) for array in (ids, labels, positions, documents)]
    batch = Batch(tensors[0], tensors[1], tensors[2], tensors[3], segments=tuple(segments))
    batch.counts = batch._count()
    return batch


def collate_text(rows: Sequence[Row | None], row_length: int, byte_lengths: np.ndarray) -> Batch:
    """`collate` with the number of bytes that are scored, which bits per byte need: counted here it costs the step no time.
    byte_lengths: as encoding.scored_bytes has them."""
    batch = collate(rows, row_length)
    assert batch.labels is not None
    batch.counts["bytes"] = int(byte_lengths[batch.labels.numpy()].sum())
    return batch
