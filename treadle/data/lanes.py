"""The order of a stream: which block each row comes from, without knowing how many rows a block holds.

An epoch permutes the blocks of the whole source and deals them to LANES lanes. Rows of a step are cut into groups, and so are the
lanes: group d of a step takes its rows from group d's lanes, one lane after another. Groups know nothing of each other, so any
number of processes that divides the groups reads the same rows. A lane that has no more blocks is passed over until all lanes of
its group are through; then the group begins its next epoch. In an epoch every block is in exactly one lane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from treadle.data.order import key, permute
from treadle.errors import CheckpointError, ConfigError

LANES = 64
_SPREAD = [int(f"{lane:06b}"[::-1], 2) for lane in range(LANES)]  # few blocks still reach all groups


def groups_of(global_batch: int, world_size: int = 1) -> int:
    """Groups that rows and lanes are cut into; ConfigError for a number of processes that does not divide them."""
    groups = math.gcd(LANES, global_batch)
    if groups % world_size:
        fits = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
        raise ConfigError(f"{world_size} processes cannot share a stream in global batches of {global_batch}: {fits} can; or make "
                          f"global_batch_size a multiple of {math.lcm(world_size, 1 << (world_size - 1).bit_length())}")  # fmt: skip
    return groups


@dataclass(frozen=True)
class BlockOrder:
    """The blocks of each lane in each epoch. blocks: how many there are."""

    blocks: int
    seed: int
    shuffle: bool = True

    def count(self, lane: int) -> int:
        """Blocks of a lane in an epoch."""
        first = _SPREAD[lane]
        return max(0, -(-(self.blocks - first) // LANES))

    def block(self, epoch: int, lane: int, ordinal: int) -> int:
        """Which block is the `ordinal`-th of a lane in an epoch."""
        place = np.array([_SPREAD[lane] + ordinal * LANES])
        return int(permute(place, self.blocks, key(self.seed, 0xB10C5, epoch))[0]) if self.shuffle else int(place[0])


@dataclass
class GroupCursor:
    """Where one group stands: its epoch, the lane whose turn it is, and of each lane [block of the epoch, row in it]."""

    epoch: int = 0
    turn: int = 0
    lanes: list[list[int]] = field(default_factory=list)

    def to_json(self) -> list[Any]:
        """Plain numbers, for run_state.json."""
        return [self.epoch, self.turn, [list(place) for place in self.lanes]]

    @staticmethod
    def from_json(found: Any, lanes: int) -> GroupCursor:
        """The inverse of `to_json`; CheckpointError for anything else."""
        try:
            epoch, turn, places = found
            cursor = GroupCursor(int(epoch), int(turn), [[int(a), int(b)] for a, b in places])
        except (TypeError, ValueError):
            raise CheckpointError(f"{found!r} is not the position of a stream") from None
        if len(cursor.lanes) != lanes or not 0 <= cursor.turn < lanes:
            raise CheckpointError(f"the position of the stream has {len(cursor.lanes)} lanes in a group, not {lanes}")
        return cursor

    @property
    def progress(self) -> tuple[int, int, int]:
        """Grows with every row."""
        return self.epoch, sum(a for a, _ in self.lanes), sum(b for _, b in self.lanes)


def first_cursor(lanes: int) -> GroupCursor:
    """The beginning of the first epoch."""
    return GroupCursor(0, 0, [[0, 0] for _ in range(lanes)])
