"""The numbers of a run: number `row` of a seed and a split, as two exact limbs of 64 bits, never as floats.

Training counts sequential numbers up from `start`, each once, so that processes and workers never meet the same; all
other kinds are drawn, keyed by (seed, row). Which split a number belongs to follows from the number alone: of every twenty
neighbours one, chosen by a hash of their position, is kept for validation and one for the test, so that nothing seen in
training is ever measured. The test split also has other sizes than training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from treadle.collatz.arithmetic import number
from treadle.collatz_tasks.settings import KINDS, LARGEST, RECORD, NumberKeys
from treadle.data.order import Mixture, key, mix64

U64 = np.uint64
MASK64 = (1 << 64) - 1
NEIGHBOURS, KEPT = 20, 18  # of twenty neighbours eighteen are for training
SPAN = 10**12  # above the record: 2^68 + U(0, this)
FEWEST_BITS, MOST_BITS = 70, 119  # of dense numbers
TEST_RECORD, TEST_BITS = 1 << 71, (120, LARGEST - 1)  # sizes that training never has
GOLDEN = 0x9E3779B97F4A7C15
LOW, HIGH, STEPS, KIND = "low", "high", "steps", "kind"  # in Batch.extras: the number in two halves, its stopping time, its kind


@dataclass(frozen=True)
class Numbers:
    """B numbers: kinds int64 [B] (places in KINDS); low, high uint64 [B], n = high 2^64 + low."""

    kinds: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def exact(self, row: int) -> int:
        return exact_number(self.low[row], self.high[row])

    def below(self, bits: int) -> np.ndarray:
        """Which are below 2^bits, bool [B]."""
        if bits >= 128:
            return np.ones(len(self.low), dtype=bool)
        return self.high < U64(1 << (bits - 64)) if bits >= 64 else (self.high == 0) & (self.low < U64(1 << bits))


def exact_number(low: Any, high: Any) -> int:
    """The number from its halves, which may be int64 bit patterns."""
    return ((int(high) & MASK64) << 64) | (int(low) & MASK64)


def held_out(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(place among its neighbours, the place kept for validation, the one kept for the test), uint64 [B] each."""
    block = low // U64(NEIGHBOURS)
    with np.errstate(over="ignore"):
        hashed = mix64(block * U64(GOLDEN) + mix64(high + U64(0xC0117A72)))
    validation = (hashed & U64(0xFFFF)) % U64(NEIGHBOURS)
    test = (validation + U64(1) + (hashed >> U64(32)) % U64(NEIGHBOURS - 1)) % U64(NEIGHBOURS)
    return low % U64(NEIGHBOURS), validation, test


def split_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """0 for training, 1 for validation, 2 for the test; int64 [B]."""
    place, validation, test = held_out(low, high)
    return np.where(place == validation, 1, np.where(place == test, 2, 0)).astype(np.int64)


class NumberSource:
    """The numbers of a seed and a split (0 training, 1 validation, 2 test)."""

    def __init__(self, keys: NumberKeys, seed: int, split: int) -> None:
        shares = keys.shares
        self.split, self.key = split, key(seed, 0xC011A, split)
        self.kinds = [KINDS.index(kind) for kind in shares]
        self.mixture = Mixture(((0, tuple(shares.values())),), self.key)
        self.start = -(-number(keys.start) // NEIGHBOURS)  # in blocks of neighbours
        if split == 2:
            self.start *= 1 << 12
        self.uniform_bits = keys.uniform_bits + (3 if split == 2 else 0)

    def numbers(self, rows: np.ndarray) -> Numbers:
        """rows int64 [B] -> their numbers."""
        source, nth = self.mixture.draws(rows)
        kinds = np.asarray(self.kinds, dtype=np.int64)[source]
        low, high = np.empty(len(rows), U64), np.zeros(len(rows), U64)
        for kind in np.unique(kinds).tolist():
            here = kinds == kind
            name = KINDS[kind]
            if name == "sequential" and self.split == 0:
                low[here], high[here] = self._counted(nth[here])
            else:
                low[here], high[here] = self._drawn(getattr(self, f"_{name}"), rows[here])
        return Numbers(kinds, low, high)

    def _counted(self, nth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nth number from the start that is for training."""
        block, place = nth // KEPT, (nth % KEPT).astype(U64)
        low, high = _limbs(self.start * NEIGHBOURS, block.astype(U64) * U64(NEIGHBOURS))
        _, validation, test = held_out(low, high)
        first, second = np.minimum(validation, test), np.maximum(validation, test)
        place = place + (place >= first)
        place = place + (place >= second)
        return low - low % U64(NEIGHBOURS) + place, high

    def _drawn(self, draw: Callable[..., tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draws until the number belongs to this split."""
        low, high = draw(self._words(rows, 0))
        attempt, wrong = 0, np.flatnonzero(split_of(low, high) != self.split)
        while len(wrong):
            attempt += 1
            low[wrong], high[wrong] = draw(self._words(rows[wrong], attempt))
            wrong = wrong[split_of(low[wrong], high[wrong]) != self.split]
        return low, high

    def _words(self, rows: np.ndarray, attempt: int) -> np.ndarray:
        """Five random words of each row, uint64 [5, B]."""
        with np.errstate(over="ignore"):
            base = mix64(rows.astype(U64) * U64(GOLDEN) + U64(key(self.key, attempt)))
            return np.stack([mix64(base + U64((word * GOLDEN) & MASK64)) for word in range(1, 6)])

    # ---- kinds, each from five random words [5, B] ----

    def _sequential(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As large as those of training, anywhere in [start, 2 start)."""
        base = self.start * NEIGHBOURS
        return _limbs(base, words[0] % U64(min(base, 1 << 62)))

    def _above_record(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _limbs(TEST_RECORD if self.split == 2 else RECORD, words[0] % U64(SPAN))

    def _three_mod_four(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = self._above_record(words)
        return low | U64(3), high

    def _dense(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each bit below the highest is one with probability 3/4."""
        fewest, most = TEST_BITS if self.split == 2 else (FEWEST_BITS, MOST_BITS)
        above = U64(fewest - 65) + words[4] % U64(most - fewest + 1)  # bits of the high limb below its highest
        top = U64(1) << above
        return words[0] | words[1], top | ((words[2] | words[3]) & (top - U64(1)))

    def _uniform(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bits = self.uniform_bits
        if bits < 64:
            return (words[0] & U64((1 << bits) - 1)) | U64(1 << bits), np.zeros_like(words[0])
        return words[0], (words[1] & U64((1 << (bits - 64)) - 1)) | U64(1 << (bits - 64))


def _limbs(base: int, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """base + offset (uint64 [B]) as (low, high)."""
    with np.errstate(over="ignore"):
        low = offset + U64(base & MASK64)
    return low, U64(base >> 64) + (low < offset).astype(U64)


def digits(low: np.ndarray, high: np.ndarray, base: int, count: int) -> np.ndarray:
    """The `count` lowest digits of high 2^64 + low, lowest first; int64 [B, count]."""
    limbs = [high >> U64(32), high & U64(0xFFFFFFFF), low >> U64(32), low & U64(0xFFFFFFFF)]
    found = np.empty((len(low), count), dtype=np.int64)
    for place in range(count):
        rest = np.zeros_like(low)
        for index, limb in enumerate(limbs):
            part = (rest << U64(32)) | limb
            limbs[index], rest = part // U64(base), part % U64(base)
        found[:, place] = rest
    return found


def digit_count(largest: int, base: int) -> int:
    """Digits that the largest number has."""
    count = 1
    while base**count <= largest:
        count += 1
    return count
