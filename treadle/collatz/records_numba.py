"""records.py's loops over the blocks of its sieve for numba; imported where numba is installed."""

from __future__ import annotations

import numpy as np
from numba import njit

ZERO, ONE, THREE, JUMP, BITS = np.uint64(0), np.uint64(1), np.uint64(3), np.uint64(12), np.uint64(16)
MASK = np.uint64(4095)
ROOM = 6000  # a block has fewer numbers left
JUMPS_TO = np.uint64(1 << 56)  # 3^12 (x >> 12) + T^12 fits 64 bits below
STEPS_TO = np.uint64((2**64 - 2) // 3)


@njit(cache=True, nogil=True)
def delays(first, end, best, bounds, small, begins, residues, images, odd_steps, powers, jump_images, jump_odd, numbers, values, replay):  # type: ignore[no-untyped-def]
    """Blocks first .. end, or as many as the last three arrays surely hold: the next block, the numbers found with a delay
    above all before, those that would leave 64 bits."""
    found, replays, before = 0, 0, len(bounds)
    for a in range(first, end):
        if found + ROOM > len(numbers) or replays + ROOM > len(replay):
            return a, found, replays
        block = np.uint64(a)
        for place in range(begins[a % 9], begins[a % 9 + 1]):
            steps = np.int64(16) + odd_steps[place]
            x = images[place] + powers[odd_steps[place]] * block
            while True:
                if steps < before and x < bounds[steps]:
                    break
                if x < JUMPS_TO and x > MASK:
                    part = x & MASK
                    f = jump_odd[part]
                    x = jump_images[part] + powers[f] * (x >> JUMP)
                    steps += 12 + f
                elif x <= MASK:
                    steps += small[x]
                    if steps > best:
                        best = steps
                        numbers[found], values[found] = residues[place] | block << BITS, np.uint64(steps)
                        found += 1
                    break
                else:
                    replay[replays] = residues[place] | block << BITS
                    replays += 1
                    break
    return end, found, replays


@njit(cache=True, nogil=True)
def maxima(first, end, best, growth, begins, residues, images, odd_steps, powers, jump_images, jump_odd, numbers, values, replay):  # type: ignore[no-untyped-def]
    """The same for maxima: numbers that meet more than all before while they are not below themselves."""
    found, replays = 0, 0
    # From x below this, 12 steps meet nothing above the record.
    jumps_to = min(best // growth - ONE if best > growth else ZERO, JUMPS_TO)
    for a in range(first, end):
        if found + ROOM > len(numbers) or replays + ROOM > len(replay):
            return a, found, replays
        block = np.uint64(a)
        for place in range(begins[a % 9], begins[a % 9 + 1]):
            n = residues[place] | block << BITS
            x, most = n, ZERO
            while x >= n:
                if x < jumps_to:
                    part = x & MASK
                    f = jump_odd[part]
                    x = jump_images[part] + powers[f] * (x >> JUMP)
                    continue
                if x & ONE:
                    if x > STEPS_TO:
                        replay[replays] = n
                        replays += 1
                        most = ZERO
                        break
                    x = THREE * x + ONE
                    most = max(most, x)
                x >>= ONE
            if most > best:
                best = most
                jumps_to = min(best // growth - ONE, JUMPS_TO)
                numbers[found], values[found] = n, most
                found += 1
    return end, found, replays
