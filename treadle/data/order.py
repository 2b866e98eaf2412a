"""The order of data: one pure function of (seed, step). Nothing is stored, so any position is reached in O(1).

Draw n = step * global batch + j. Epoch e = n div N, row = P(n mod N; N, seed, e), where P is a keyed permutation of
range(N): Fisher-Yates keyed by Philox up to 16384 rows, above that an 8-round Feistel network (Luby and Rackoff 1988)
with cycle walking. With weights, every block of 1024 draws holds exact quotas of each source, in a keyed order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

U64 = np.uint64
MASK64 = (1 << 64) - 1
TABLE_LIMIT = 1 << 14  # up to here a permutation is a table: exact shuffle, 128 kB at most
FEISTEL_ROUNDS = 8
BLOCK = 1024


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), vectorised over uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
        return x ^ (x >> U64(31))


def key(*parts: int) -> int:
    """A 64-bit key from integers; different tuples (also of different lengths) give unrelated keys."""
    state = 0x9E3779B97F4A7C15 ^ len(parts)
    for part in parts:
        word = (state + 0x9E3779B97F4A7C15 * (int(part) & MASK64) + 1) & MASK64
        state = int(_mix(np.array([word], dtype=U64))[0])
    return state


@functools.lru_cache(maxsize=64)
def _table(size: int, permutation_key: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=permutation_key)).permutation(size).astype(np.int64)


def permute(index: np.ndarray, size: int, permutation_key: int) -> np.ndarray:
    """The images of `index` (int [K], in range(size)) under a keyed permutation of range(size); int64 [K]."""
    index = np.asarray(index, dtype=np.int64)
    if size <= TABLE_LIMIT:
        return _table(size, permutation_key)[index]
    half = ((size - 1).bit_length() + 1) // 2
    mask, shift = U64((1 << half) - 1), U64(half)
    round_keys = [U64(key(permutation_key, r)) for r in range(FEISTEL_ROUNDS)]

    def encrypt(x: np.ndarray) -> np.ndarray:
        left, right = x >> shift, x & mask
        for round_key in round_keys:
            with np.errstate(over="ignore"):
                left, right = right, left ^ (_mix(right + round_key) & mask)
        return (left << shift) | right

    x = encrypt(index.astype(U64))
    outside = x >= U64(size)
    while outside.any():  # cycle walking: the domain is below four times `size`
        x[outside] = encrypt(x[outside])
        outside = x >= U64(size)
    return x.astype(np.int64)


@dataclass(frozen=True)
class Order:
    """Which row each draw takes.

    sizes: rows of each source. weights: None draws from all sources as one; else exact quotas in every 1024 draws.
    end: draws from here on are surplus (after the last epoch) and come out as row -1.
    """

    sizes: tuple[int, ...]
    seed: int
    shuffle: bool = True
    weights: tuple[float, ...] | None = None
    end: int | None = None

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def draws(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw numbers int64 [K] -> (source [K], row within the source [K]); a surplus draw is (0, -1)."""
        numbers = np.asarray(numbers, dtype=np.int64)
        if self.weights is None:
            joint = self._epochs(numbers, self.rows, 0)
            starts = np.concatenate([[0], np.cumsum(self.sizes)])
            source = np.searchsorted(starts, joint, side="right") - 1
            row = joint - starts[source]
        else:
            source, nth = self._mixture(numbers)
            row = np.zeros_like(nth)
            for s, size in enumerate(self.sizes):
                mine = source == s
                row[mine] = self._epochs(nth[mine], size, s + 1)
        if self.end is not None:
            surplus = numbers >= self.end
            source, row = np.where(surplus, 0, source), np.where(surplus, -1, row)
        return source, row

    def _epochs(self, numbers: np.ndarray, size: int, stream: int) -> np.ndarray:
        if not self.shuffle:
            return numbers % size
        epochs = numbers // size
        rows = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = permute(numbers[here] % size, size, key(self.seed, stream, int(epoch)))
        return rows

    @functools.cached_property
    def quotas(self) -> np.ndarray:
        """Draws of each source in a block, largest remainders first; they add up to 1024."""
        assert self.weights is not None
        share = np.asarray(self.weights, dtype=np.float64)
        share = share / share.sum() * BLOCK
        quota = np.floor(share).astype(np.int64)
        short = np.argsort(-(share - quota), kind="stable")[: BLOCK - int(quota.sum())]
        quota[short] += 1
        return quota

    def _mixture(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(len(self.sizes)), self.quotas)
        source = np.empty_like(numbers)
        nth = np.empty_like(numbers)
        for block in np.unique(numbers // BLOCK):
            here = numbers // BLOCK == block
            order = permute(np.arange(BLOCK), BLOCK, key(self.seed, 0xB10C, int(block)))
            mixed = labels[order] if self.shuffle else labels
            earlier = np.empty(BLOCK, dtype=np.int64)  # draws of the same source earlier in this block
            for s, quota in enumerate(self.quotas):
                earlier[mixed == s] = np.arange(quota)
            place = numbers[here] % BLOCK
            source[here] = mixed[place]
            nth[here] = block * self.quotas[source[here]] + earlier[place]
        return source, nth


def step_draws(step: int, global_batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """The draw numbers of one rank in one step (0-based): row j of a step belongs to rank floor(j W / G)."""
    share = global_batch // world
    first = step * global_batch + rank * share
    return np.arange(first, first + share, dtype=np.int64)


def model_seed(seed: int, step: int, micro_step: int, rank: int = 0) -> int:
    """The seed of everything random inside one forward pass."""
    return key(seed, 0x5EED, step, micro_step, rank) >> 1
