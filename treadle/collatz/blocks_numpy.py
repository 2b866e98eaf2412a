"""Units on arrays of numpy: the tree level by level, then its numbers step by step. No compiler; the same Totals.

Parities of the next 64 steps are those of y mod 2^64, so 64-bit integers that wrap are enough down to the second look; who
is still above its start then, about one in four, is followed in Python integers. So is every number whose path could hold
the unit's maximum: one with f odd steps meets nothing above 2 (3/2)^f n.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log2
from typing import Any

import numpy as np

from treadle.collatz import blocks
from treadle.collatz import sieve as sieves
from treadle.collatz.blocks import Totals, Unit

LEAVES = 1 << 14  # at a time; 2^20 numbers
LIMB = (1 << 64) - 1
ONE = np.uint64(1)


def _steps(y: Any, height: Any, history: Any, window: int) -> tuple[Any, Any, Any]:
    odd = (y & ONE).astype(bool)
    height = height + np.where(odd, sieves.UP, -sieves.DOWN)
    history = history << 1 | odd
    history = np.where(history >> window + 1, history & ((1 << window) - 1) | 1 << window, history)
    return np.where(odd, y + (y >> ONE) + ONE, y >> ONE), height, history


def _leaves(unit: Unit, rules: sieves.Rules) -> Iterator[tuple[Any, Any, Any, Any]]:
    """(r, x, f, E) of the tree's leaves as arrays of at most LEAVES or so, in any order."""
    scores, end = np.array(rules.scores(), np.int64), sieves.depth(unit.bits)
    powers = np.array([3**f & LIMB for f in range(end + 1)], np.uint64)
    zero, none = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    stack: list[tuple[int, list[Any]]] = [(0, [zero, zero, none, none, np.ones(1, np.int64)])]
    while stack:
        k, arrays = stack.pop()
        r, x, f, height, history = arrays
        if k == end:
            yield r, x, f, height
            continue
        if len(r) > LEAVES:
            middle = len(r) // 2
            stack += [(k, [a[part] for a in arrays]) for part in (slice(middle), slice(middle, None))]
            continue
        parts = []
        for bit in (unit.prefix >> k & 1,) if k < unit.prefix_bits else (0, 1):
            y = x + powers[f] if bit else x
            after, e, past = _steps(y, height, history, rules.window)
            good = e >= scores[past]
            parts.append([a[good] for a in (r | np.uint64(bit << k), after, f + (y & ONE).astype(np.int64), e, past)])
        stack.append((k + 1, [np.concatenate([part[i] for part in parts]) for i in range(5)]))


def _survivors(unit: Unit, rules: sieves.Rules) -> Iterator[tuple[int, Any, Any, Any, Any]]:
    """(how many leaves, and of their candidates r + b 2^depth, b, y mod 2^64 at the tree's end, E)."""
    scores, end = np.array(rules.scores(), np.int64), sieves.depth(unit.bits)
    powers = np.array([3**f & LIMB for f in range(end + 1)], np.uint64)
    free = np.ones(sieves.TERNARY, bool)
    free[list(rules.residues())] = False
    b = np.arange(1 << sieves.WORD, dtype=np.uint64)
    offset = (unit.high << sieves.WORD) & LIMB
    for r, x, f, height in _leaves(unit, rules):
        numbers = r[:, None] + (b << np.uint64(end))
        y = x[:, None] + powers[f][:, None] * (b + np.uint64(offset))
        seen = y if rules.with_high else x[:, None] + powers[f][:, None] * b
        good = free[
            (numbers % np.uint64(sieves.TERNARY) + np.uint64(unit.start % sieves.TERNARY)) % np.uint64(sieves.TERNARY)
        ]
        if unit.start < sieves.FLOOR:
            good &= numbers >= np.uint64(sieves.FLOOR)
        at = np.nonzero(good.ravel())[0]
        still = np.arange(len(at))
        tall = np.broadcast_to(height[:, None], y.shape).ravel()[at]
        z, e, history = seen.ravel()[at], tall, np.ones(len(at), np.int64)
        passed = tall > sieves.HIGHEST
        for _ in range(sieves.lookahead(unit.bits)):
            z, e, history = _steps(z, e, history, rules.window)
            alive = e >= scores[history]
            still, z, e, history = still[alive], z[alive], e[alive], history[alive]
        passed[still] = True
        kept = at[passed]
        yield len(r), numbers.ravel()[kept], y.ravel()[kept], tall[passed], np.repeat(f, len(b))[kept]


def followed(unit: Unit, rules: sieves.Rules) -> Totals:
    found, end = Totals(), sieves.depth(unit.bits)
    log_end = log2(unit.start + (1 << unit.bits))
    for leaves, numbers, y, height, f in _survivors(unit, rules):
        found = found.merge(Totals(leaves=leaves))
        for looks, steps in ((1, blocks.FIRST_LOOK), (2, blocks.JUMP)):
            for _ in range(steps):
                odd = (y & ONE).astype(bool)
                height, f = height + np.where(odd, sieves.UP, -sieves.DOWN), f + odd
                y = np.where(odd, y + (y >> ONE) + ONE, y >> ONE)
            # log2 of 2 (3/2)^f n, rounded up, against the maximum so far and against 2^128
            reach = 1 + 0.5849625008 * f + log_end + 1e-6
            known = min(log2(found.maximum) if found.maximum else 0.0, 128.0)
            dead = height <= 0
            quiet = dead & (reach < known)
            found = found.merge(Totals(0, int(quiet.sum()), looks * int(quiet.sum()), int(f[quiet].sum())))
            for residue in numbers[dead & ~quiet]:
                found = found.merge(blocks.follow(unit.start + int(residue), end))
            numbers, y, height, f = numbers[~dead], y[~dead], height[~dead], f[~dead]
        for residue in numbers:
            found = found.merge(blocks.follow(unit.start + int(residue), end))
    return found


def candidates(unit: Unit, rules: sieves.Rules) -> list[int]:
    return [unit.start + int(residue) for part in _survivors(unit, rules) for residue in part[1]]


def every_third(unit: Unit) -> Totals:
    """All n = 3 mod 4 of a unit, from 3 on."""
    return blocks.every(unit.first(3, 2))
