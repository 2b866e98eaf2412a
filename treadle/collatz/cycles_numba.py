"""cycles.py's loop over Lyndon words for numba; imported where numba is installed."""

from __future__ import annotations

import numpy as np
from numba import njit

ONE = np.uint64(1)
LARGEST = np.int64((1 << 63) - 1)


@njit(cache=True, nogil=True)
def words(word, state, longest, q, factor, bound, most, found):  # type: ignore[no-untyped-def]
    """Goes on through the words from state = [length of the word, words so far], for `most` of them or until `found` is full;
    length 0 says that there are no more. Rows of found: the length, then the word."""
    size, count, tried = state[0], 0, 0
    while size and tried < most and count < found.shape[0]:
        word[size - 1] += 1
        tried += 1
        sums, odd, power = np.uint64(0), 0, ONE
        for place in range(size):
            if word[place]:
                sums = q * sums + power
                odd += 1
            power <<= ONE
        n = np.int64(factor[size, odd] * sums)
        most_n = bound[size, odd]
        if most_n == LARGEST or -most_n <= n <= most_n:
            found[count, 0] = size
            for place in range(size):
                found[count, 1 + place] = word[place]
            count += 1
        period = size
        while size < longest:
            word[size] = word[size - period]
            size += 1
        while size and word[size - 1] == 1:
            size -= 1
    state[0] = size
    state[1] += tried
    return count
