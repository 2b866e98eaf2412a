"""The bit-vectors of the verifier, one for each number of odd steps that its tree ends with, filled by compiled code."""

from __future__ import annotations

import numpy as np

from treadle.collatz.kernel_base import U, compiled


@compiled
def fill_vector(words, f, height, steps, scores, window, powers):
    """Sets bit i of `words` where a number that is 3^f i modulo 2^steps, at this height, is not excluded on the way."""
    at = np.empty((steps + 2, 4), np.int64)
    low = np.empty((steps + 2, 2), np.uint64)
    at[0, 0], at[0, 1], at[0, 2], at[0, 3] = 0, f, height, 1
    low[0, 0] = low[0, 1] = U(0)
    full, mask, lead = 2 << window, (1 << window) - 1, 1 << window
    count = 1
    while count:
        count -= 1
        step, g, e, h = at[count, 0], at[count, 1], at[count, 2], at[count, 3]
        i, x = low[count, 0], low[count, 1]
        if step == steps:
            words[i >> U(6)] |= U(1) << (i & U(63))
            continue
        for bit in range(2):
            y = x + powers[g] if bit else x
            odd = np.int64(y & U(1))
            after = e + 179 if odd else e - 306
            past = h << 1 | odd
            if past >= full:
                past = past & mask | lead
            if after >= scores[past]:
                at[count, 0], at[count, 1], at[count, 2], at[count, 3] = step + 1, g + odd, after, past
                low[count, 0] = i | U(bit) << U(step)
                low[count, 1] = y + (y >> U(1)) + U(1) if odd else y >> U(1)
                count += 1
