"""The order of data: one pure function of (seed, step). Nothing is stored, so any position is reached in O(1).

Draw n = step * global batch + j. Epoch e = n div N, row = P(n mod N; N, seed, e), where P is a keyed permutation of
range(N): Fisher-Yates keyed by Philox up to 16384 rows, above that an 8-round Feistel network (Luby and Rackoff 1988)
with cycle walking. With weights, every block of 1024 draws holds exact quotas of each source, in a keyed order; weights may
change over a run, and each set of them begins its own blocks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

U64 = np.uint64
MASK64 = (1 << 64) - 1
TABLE_LIMIT = 1 << 14  # up to here a permutation is a table: exact shuffle, 128 kB at most
FEISTEL_ROUNDS = 8
BLOCK = 1024


def mix64(x: np.ndarray) -> np.ndarray:
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
        state = int(mix64(np.array([word], dtype=U64))[0])
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
                left, right = right, left ^ (mix64(right + round_key) & mask)
        return (left << shift) | right

    x = encrypt(index.astype(U64))
    outside = x >= U64(size)
    while outside.any():  # cycle walking: the domain is below four times `size`
        x[outside] = encrypt(x[outside])
        outside = x >= U64(size)
    return x.astype(np.int64)


Segments = tuple[tuple[int, tuple[float, ...]], ...]  # (first step, or first draw; weights)


def segments_of(weights: Sequence[Any]) -> Segments:
    """[.7, .3] or [[0, .9, .1], [10000, .5, .5]] as ((first step, weights), ...). ValueError that says what is wrong."""
    if not weights or not isinstance(weights[0], (list, tuple)):
        weights = [[0, *weights]]
    segments = tuple((int(row[0]), tuple(float(w) for w in row[1:])) for row in weights)
    steps = [step for step, _ in segments]
    if any(row[0] != int(row[0]) for row in weights) or steps[0] != 0 or any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError(f"a schedule of weights is [[0, weight, ...], [step, weight, ...], ...] with growing steps, not {list(weights)}")
    if len({len(some) for _, some in segments}) != 1:
        raise ValueError("every row of a schedule of weights needs one weight for each path")
    if any(not 0 <= w < float("inf") for _, some in segments for w in some) or any(sum(some) <= 0 for _, some in segments):
        raise ValueError("weights must be positive numbers (0 where a source rests, not all of them)")
    if any(not any(some[s] for _, some in segments) for s in range(len(segments[0][1]))):
        raise ValueError("weights must be positive numbers; one source never has any")
    return segments


@functools.lru_cache(maxsize=64)
def quotas(weights: tuple[float, ...]) -> np.ndarray:
    """Draws of each source in a block, largest remainders first; they add up to 1024."""
    share = np.asarray(weights, dtype=np.float64)
    share = share / share.sum() * BLOCK
    quota = np.floor(share).astype(np.int64)
    short = np.argsort(-(share - quota), kind="stable")[: BLOCK - int(quota.sum())]
    quota[short] += 1
    return quota


@dataclass(frozen=True)
class Mixture:
    """Which source each draw comes from, where sources have weights: exact shares in every 1024 draws, in a keyed order.

    segments: (first draw, weights). Each counts its draws of a source on from those before it.
    """

    segments: Segments
    seed: int
    shuffle: bool = True

    @staticmethod
    def of(weights: Sequence[Any], seed: int, shuffle: bool, global_batch: int) -> Mixture:
        """From weights as [data] has them, whose schedule is in steps."""
        return Mixture(tuple((step * global_batch, some) for step, some in segments_of(weights)), seed, shuffle)

    def draws(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw numbers int64 [K] -> (source [K], how many draws of that source came before [K])."""
        source, nth = np.empty_like(numbers), np.empty_like(numbers)
        starts = np.array([first for first, _ in self.segments])
        segment = np.searchsorted(starts, numbers, side="right") - 1
        for s in np.unique(segment).tolist():
            here = segment == s
            source[here], nth[here] = self._in_segment(s, numbers[here] - starts[s])
        return source, nth

    def counts(self, end: int) -> np.ndarray:
        """Draws of each source among the first `end`, int64 [sources]."""
        total = np.zeros(len(self.segments[0][1]), dtype=np.int64)
        for s, (first, weights) in enumerate(self.segments):
            if first >= end:
                break
            last = self.segments[s + 1][0] if s + 1 < len(self.segments) else end
            blocks, rest = divmod(min(last, end) - first, BLOCK)
            total += blocks * quotas(weights)
            if rest:
                total += np.bincount(self._block(s, blocks)[:rest], minlength=len(total))
        return total

    def _block(self, segment: int, block: int) -> np.ndarray:
        """The sources of a block's draws, int64 [1024]."""
        quota = quotas(self.segments[segment][1])
        labels = np.repeat(np.arange(len(quota)), quota)
        if not self.shuffle:
            return labels
        parts = (self.seed, 0xB10C, block) if segment == 0 else (self.seed, 0xB10C, block, segment)
        return labels[permute(np.arange(BLOCK), BLOCK, key(*parts))]

    def _in_segment(self, segment: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        quota = quotas(self.segments[segment][1])
        before = self.counts(self.segments[segment][0])
        source, nth = np.empty_like(numbers), np.empty_like(numbers)
        for block in np.unique(numbers // BLOCK).tolist():
            here = numbers // BLOCK == block
            mixed = self._block(segment, block)
            earlier = np.empty(BLOCK, dtype=np.int64)  # draws of the same source earlier in this block
            for s, count in enumerate(quota):
                earlier[mixed == s] = np.arange(count)
            place = numbers[here] % BLOCK
            source[here] = mixed[place]
            nth[here] = before[source[here]] + block * quota[source[here]] + earlier[place]
        return source, nth


@dataclass(frozen=True)
class Order:
    """Which row each draw takes.

    sizes: rows of each source. weights: None draws from all sources as one; else a Mixture, whose schedule
    is in steps of global_batch draws. end: draws from here on are surplus (after the last epoch) and come out as row -1.
    """

    sizes: tuple[int, ...]
    seed: int
    shuffle: bool = True
    weights: tuple[Any, ...] | None = None
    end: int | None = None
    global_batch: int = 1

    @property
    def rows(self) -> int:
        """Rows of all sources."""
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
            source, nth = self.mixture.draws(numbers)
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
    def mixture(self) -> Mixture:
        """Which source each draw comes from; only with weights."""
        assert self.weights is not None
        return Mixture.of(self.weights, self.seed, self.shuffle, self.global_batch)


def step_draws(step: int, global_batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """The draw numbers of one rank in one step (0-based): row j of a step belongs to rank floor(j W / G)."""
    share = global_batch // world
    first = step * global_batch + rank * share
    return np.arange(first, first + share, dtype=np.int64)


def model_seed(seed: int, step: int, micro_step: int, rank: int = 0) -> int:
    """The seed of everything random inside one forward pass."""
    return key(seed, 0x5EED, step, micro_step, rank) >> 1
