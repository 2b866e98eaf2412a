"""trajectories.py's loop for numba; imported where numba is installed."""

from __future__ import annotations

import numpy as np
from numba import njit

ONE, SHIFT, THREE = np.uint64(1), np.uint64(63), np.uint64(3)
THIRD, TWO_THIRDS = np.uint64(0x5555555555555555), np.uint64(0xAAAAAAAAAAAAAAAA)


@njit(cache=True, nogil=True)
def rows(low, high, shortcut, found, steps):  # type: ignore[no-untyped-def]
    """Fills found uint8 [B, L] and steps int64 [B]; -1 where a number leaves 128 bits."""
    length = found.shape[1]
    for row in range(len(low)):
        lo, hi = low[row], high[row]
        count, place = 0, 0
        counting = not (lo == ONE and hi == 0)
        while counting or place < length:
            odd = lo & ONE
            if place < length:
                found[row, place] = odd
            elif hi == 0 and lo < THIRD:  # parities are shown and 64 bits hold the next step: the short loop
                if odd:
                    lo = THREE * lo + ONE
                    count += 1
                lo >>= ONE
                count += 1
                while not lo & ONE:
                    lo >>= ONE
                    count += 1
                if lo == ONE:
                    break
                continue
            place += 1
            if odd:
                if hi >= THIRD:
                    if counting:
                        count = -1
                    break
                carry = np.uint64(lo > THIRD) + np.uint64(lo > TWO_THIRDS)
                lo = THREE * lo + ONE
                hi = THREE * hi + carry + np.uint64(lo == 0)
                if counting:
                    count += 1
            if shortcut or not odd:
                lo = (lo >> ONE) | (hi << SHIFT)
                hi >>= ONE
                if counting:
                    count += 1
            if counting and lo == ONE and hi == 0:
                counting = False
        steps[row] = count
