"""How documents share rows of a fixed length.

A plan is flat: row r holds the segments row_starts[r] to row_starts[r + 1], segment s holds `length[s]` tokens from
`start[s]` of the token stream. Documents longer than a row are split; nothing is dropped, duplicated or otherwise cut.
`concat` needs no plan (row r is tokens r L to (r + 1) L) and is computed where it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Which segments make each row."""

    row_starts: np.ndarray  # int64 [rows + 1]
    start: np.ndarray  # int64 [segments]
    length: np.ndarray  # int32 [segments]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.row_starts) - 1

    def efficiency(self, row_length: int) -> float:
        """Share of positions that hold a token rather than padding."""
        return float(self.length.sum()) / max(1, self.rows * row_length)


def pieces_of(document_starts: np.ndarray, total: int, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most `row_length`: (start [P], length [P])."""
    ends = np.append(document_starts[1:], total)
    lengths = ends - document_starts
    counts = np.maximum(1, -(-lengths // row_length))
    document = np.repeat(np.arange(len(lengths)), counts)
    ordinal = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = document_starts[document] + ordinal * row_length
    length = np.minimum(row_length, ends[document] - start)
    keep = length > 0
    return start[keep].astype(np.int64), length[keep].astype(np.int32)


def pack(mode: str, lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Piece lengths -> rows of piece numbers, by `none`, `next_fit`, `first_fit` or `best_fit` (decreasing)."""
    return {"none": _none, "next_fit": _next_fit, "first_fit": _first_fit, "best_fit": _best_fit}[mode](
        lengths.tolist(), row_length
    )


def plan(mode: str, document_starts: np.ndarray, total: int, row_length: int) -> Plan:
    """The plan of one token stream whose documents begin at `document_starts`."""
    start, length = pieces_of(document_starts, total, row_length)
    rows = pack(mode, length, row_length)
    order = np.fromiter((piece for row in rows for piece in row), dtype=np.int64, count=len(length))
    sizes = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    return Plan(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), start[order], length[order])


def _none(lengths: list[int], row_length: int) -> list[list[int]]:
    return [[piece] for piece in range(len(lengths))]


def _next_fit(lengths: list[int], row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room = 0
    for piece, need in enumerate(lengths):
        if need > room:
            rows.append([])
            room = row_length
        rows[-1].append(piece)
        room -= need
    return rows


def _first_fit(lengths: list[int], row_length: int) -> list[list[int]]:
    """The lowest-numbered row with room, found in a max-tree over the rooms of all rows."""
    leaves = 1 << max(1, (len(lengths) - 1).bit_length())
    room = [row_length] * (2 * leaves)  # rows not opened yet are empty, so a fit always exists
    rows: list[list[int]] = []
    for piece, need in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < need:
                node += 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        room[node] -= need
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def _best_fit(lengths: list[int], row_length: int) -> list[list[int]]:
    """Longest first, each into the fullest row with room; bit r of `free` says that some row has room r left."""
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    free = 0
    for piece in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        need = lengths[piece]
        fits = free >> need
        if fits:
            room = need + (fits & -fits).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = room - need
        if left:
            with_room[left].append(row)
            free |= 1 << left
    return rows
