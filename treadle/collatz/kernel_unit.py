"""Units on the compiled path: what kernel.py needs is made once a process, and what it gives back is followed in integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Any

import numpy as np

from treadle.collatz import blocks, kernel, kernel_vectors
from treadle.collatz import sieve as sieves
from treadle.collatz.blocks import Totals, Unit

BATCHES = 2000  # a call; .1 s, after which a signal is noticed
LOST = 1 << 17
LIMB = (1 << 64) - 1


@dataclass(frozen=True)
class Tables:
    """For blocks of one size under one set of rules."""

    scores: Any
    vectors: Any
    least: int  # f of the first vector


@lru_cache
def _jumps() -> tuple[Any, Any, Any]:
    """T^16(r) and its odd steps for r < 2^16; 3^f and its inverse modulo 2^64."""
    values, odd_steps = np.arange(1 << kernel.JUMP, dtype=np.uint64), np.zeros(1 << kernel.JUMP, np.uint64)
    one = np.uint64(1)
    for _ in range(kernel.JUMP):
        odd = values & one
        values = np.where(odd == one, (np.uint64(3) * values + one) >> one, values >> one)
        odd_steps += odd
    table = (odd_steps << np.uint64(kernel.VALUES) | values).astype(np.uint32)
    powers = np.array([3**f & LIMB for f in range(kernel.POWERS)], np.uint64)
    inverses = np.array([pow(3, -f, 1 << 64) for f in range(kernel.POWERS)], np.uint64)
    return table, powers, inverses


@lru_cache(maxsize=4)
def _tables(bits: int, rules: sieves.Rules) -> Tables:
    scores = np.array(rules.scores(), np.int32)
    end, steps = sieves.depth(bits), sieves.lookahead(bits)
    heights = [485 * f - 306 * end for f in range(end + 1)]
    wanted = [f for f, height in enumerate(heights) if 0 < height <= sieves.HIGHEST]
    vectors = np.zeros((max(1, len(wanted)), (1 << steps >> 6) + 1), np.uint64)
    powers = _jumps()[1]
    for row, f in enumerate(wanted):
        kernel_vectors.fill_vector(vectors[row], f, heights[f], steps, scores, rules.window, powers)
    vectors[:, -1] = vectors[:, 0]  # a word that begins inside the last one goes on with the first
    return Tables(scores, vectors, wanted[0] if wanted else 0)


def _ternary(unit: Unit, rules: sieves.Rules) -> Any:
    """By r mod 729, the word of the numbers r + start + b 2^depth that have no smaller predecessor by their residue."""
    stride, size = 1 << sieves.depth(unit.bits), sieves.TERNARY
    free = np.ones(size, np.uint64)
    free[list(rules.residues())] = 0
    at = np.arange(size) + unit.start % size
    words = np.zeros(size, np.uint64)
    for b in range(1 << sieves.WORD):
        words |= free[(at + b * (stride % size)) % size] << np.uint64(b)
    return words


def _parts(unit: Unit, rules: sieves.Rules) -> tuple[Any, ...]:
    tables = _tables(unit.bits, rules)
    high, upper = unit.high & LIMB, unit.high >> 64
    floor = sieves.FLOOR if unit.start < sieves.FLOOR else 0
    end_log = log2(unit.start + (1 << unit.bits))
    block = (
        np.uint64(unit.prefix),
        unit.prefix_bits,
        unit.bits,
        np.uint64(high),
        np.uint64(upper),
        np.uint64(floor),
        end_log,
    )
    offset = (unit.high << sieves.WORD) & LIMB if rules.with_high else 0
    tree = (
        tables.scores, rules.window, _ternary(unit, rules), tables.vectors, tables.least, sieves.HIGHEST,
        np.uint64(offset), sieves.lookahead(unit.bits),
    )  # fmt: skip
    return block, tree, _jumps()


def _root() -> tuple[Any, Any]:
    stack, low = np.zeros((64, 4), np.int64), np.zeros((64, 2), np.uint64)
    stack[0, 3] = 1
    return stack, low


def _integers(pairs: Any, count: int) -> Iterable[int]:
    return (int(pairs[i, 0]) << 64 | int(pairs[i, 1]) for i in range(count))


def fits(unit: Unit) -> bool:
    return (unit.high + 1) << unit.bits <= 1 << kernel.WIDEST


def followed(unit: Unit, rules: sieves.Rules) -> Totals:
    if not fits(unit):
        from treadle.collatz import blocks_numpy

        return blocks_numpy.followed(unit, rules)
    block, tree, tables = _parts(unit, rules)
    stack, low = _root()
    counts, best = np.zeros(7, np.int64), np.zeros(4, np.uint64)
    lost = np.empty((LOST, 2), np.uint64)
    huge = np.empty((16 * 64 * kernel.BATCH, 2), np.uint64)
    counts[0] = 1
    replayed, seen = Totals(), set[int]()
    while counts[0]:
        kernel.advance(BATCHES, stack, low, counts, best, block, tree, tables, lost, huge)
        for n in _integers(lost, int(counts[5])):
            replayed = replayed.merge(blocks.follow(n, sieves.depth(unit.bits)))
        for n in set(_integers(huge, int(counts[6]))) - seen:
            seen.add(n)
            whole = blocks.follow(n, sieves.depth(unit.bits))
            replayed = replayed.merge(Totals(maximum=whole.maximum, argmax=n, overflow=whole.overflow))
        counts[5] = counts[6] = 0
    _, leaves, candidates, jumps, odd_steps = (int(count) for count in counts[:5])
    maximum, argmax = _integers(best.reshape(2, 2), 2)
    found = replayed.merge(Totals(leaves, candidates, jumps, odd_steps, maximum, argmax))
    return Totals(**{**found.__dict__, "overflow": tuple(sorted(set(found.overflow)))})


def candidates(unit: Unit, rules: sieves.Rules) -> list[int]:
    if not fits(unit):
        from treadle.collatz import blocks_numpy

        return blocks_numpy.candidates(unit, rules)
    block, tree, tables = _parts(unit, rules)
    stack, low = _root()
    room = kernel.BATCH
    arrays = [np.empty(room, np.uint64) for _ in range(2)] + [np.empty(room, np.int64) for _ in range(2)]
    words, top, found = np.empty(room, np.uint64), 1, []
    scores, window, ternary, vectors, least, highest, offset, steps = tree
    end = sieves.depth(unit.bits)
    while top:
        top, count = kernel.descend(
            stack, low, top, block[0], unit.prefix_bits, end, scores, window, tables[1], *arrays
        )
        kernel.look_up(count, *arrays, words, offset, steps, vectors, least, highest, tables[2], ternary)
        for leaf in range(count):
            word = int(words[leaf])
            start = unit.start + int(arrays[0][leaf])
            found += [start + (b << end) for b in range(1 << sieves.WORD) if word >> b & 1]
    return [n for n in found if n >= sieves.FLOOR]


def every_third(unit: Unit) -> Totals:
    """All n = 3 mod 4 of a unit, from 3 on."""
    if not fits(unit):
        return blocks.every(unit.first(3, 2))
    numbers = unit.first(3, 2)
    first = next(numbers, None)
    if first is None:
        return Totals()
    second = next(numbers, first)
    step = second - first
    count = (unit.start + (1 << unit.bits) - first - 1) // step + 1 if step else 1
    found, done, piece = Totals(), 0, 1 << 18
    lost = np.empty((piece, 2), np.uint64)
    while done < count:
        here, at = min(piece, count - done), first + done * step
        best = np.zeros(4, np.uint64)
        odd_steps, losses = kernel.follow_all(
            np.uint64(at >> 64), np.uint64(at & LIMB), np.uint64(step), here, best, lost
        )
        maximum, argmax = _integers(best.reshape(2, 2), 2)
        found = found.merge(Totals(0, here - losses, 0, int(odd_steps), maximum, argmax))
        found = found.merge(blocks.every(_integers(lost, losses)))
        done += here
    return found
