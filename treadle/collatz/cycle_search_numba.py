"""cycle_search.py's loop for numba; imported where numba is installed."""

from __future__ import annotations

import numpy as np
from numba import njit

ZERO, ONE, HALF = np.uint64(0), np.uint64(1), np.uint64(32)
SHIFT, WORD = np.uint64(63), np.uint64(0xFFFFFFFF)
FULL = np.uint64(0xFFFFFFFFFFFFFFFF)


@njit(cache=True, nogil=True)
def below(first_low, first_high, size, q, c, minus, most_steps, bits, again, unresolved):  # type: ignore[no-untyped-def]
    """Follows the positive numbers first .. first + size - 1 under q x + c (q x - c with `minus`), q and c < 2^31.

    Offsets of those that it cannot settle go into `again`: it stops when that is full. With bits (<= 126) those that exceed
    2^bits are unresolved, the first of them named; without, they are among the others. Returns numbers done, of them in `again`,
    odd steps, unresolved ones, and the maximum's two limbs and offset, over those that came below themselves."""
    most_low, most_high, argmax = ZERO, ZERO, 0
    odd_steps, replays, lost = 0, 0, 0
    short_limit = (FULL - c) // q  # q x + c fits 64 bits up to here
    high_limit = (FULL >> ONE) // q - ONE
    for offset in range(size):
        if replays == again.shape[0]:
            return offset, replays, odd_steps, lost, most_low, most_high, argmax
        start_low = first_low + np.uint64(offset)
        start_high = first_high + np.uint64(start_low < first_low)
        lo, hi = start_low, start_high
        met_low, met_high = lo, hi
        seen_low, seen_high = lo, hi
        odd, since, power, outcome = 0, 0, 1, 2
        for _ in range(most_steps):
            if lo & ONE:
                odd += 1
                if hi == ZERO and lo <= short_limit:
                    lo = q * lo
                    if minus:
                        if lo <= c:
                            break
                        lo -= c
                    else:
                        lo += c
                else:
                    if hi > high_limit:
                        break
                    part = (lo & WORD) * q
                    upper = (lo >> HALF) * q + (part >> HALF)
                    hi = hi * q + (upper >> HALF)
                    lo = (upper << HALF) | (part & WORD)
                    if minus:
                        hi -= np.uint64(lo < c)
                        lo -= c
                    else:
                        lo += c
                        hi += np.uint64(lo < c)
                if hi > met_high or (hi == met_high and lo > met_low):
                    met_low, met_high = lo, hi
            lo = (lo >> ONE) | (hi << SHIFT)
            hi >>= ONE
            if hi < start_high or (hi == start_high and lo < start_low):
                outcome = 0
                break
            if lo == seen_low and hi == seen_high:
                break
            if bits and (hi >> np.uint64(bits - 64) if bits > 63 else (hi or lo >> np.uint64(bits))):
                outcome = 1
                break
            since += 1
            if since == power:
                seen_low, seen_high = lo, hi
                power *= 2
                since = 0
        if outcome == 0:
            odd_steps += odd
            if met_high > most_high or (met_high == most_high and met_low > most_low):
                most_low, most_high, argmax = met_low, met_high, offset
        elif outcome == 1:
            if lost < unresolved.shape[0]:
                unresolved[lost] = offset
            lost += 1
        else:
            again[replays] = offset
            replays += 1
    return size, replays, odd_steps, lost, most_low, most_high, argmax
