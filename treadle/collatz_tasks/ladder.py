"""Effective bits: what a predictor of the stopping time is worth, in exact low bits of the number.

The lowest k bits of n are its first k parities (Terras 1976), and with them the number of odd steps among these; the rest of
a trajectory looks like any other of its size. So who knows k low bits and the size explains a share R2(k) of the stopping
times' spread and no more (at 2^68 about .05 from 16 bits, .22 from all 68): a ladder on which a model's own R2 is read off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from treadle.collatz.trajectories import labels

RUNGS = (0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 68, 96, 120)


@dataclass(frozen=True)
class Ladder:
    """shares[i]: R2 of a least-squares fit of the stopping time on the size of n (its logarithm) and on the odd steps among the
    first rungs[i] shortcut steps."""

    rungs: tuple[int, ...]
    shares: tuple[float, ...]

    @staticmethod
    def measured(low: np.ndarray, high: np.ndarray) -> Ladder:
        """From these numbers, uint64 [B] each."""
        size = np.log2(high.astype(np.float64) * 2.0**64 + low.astype(np.float64))
        bits = int(size.min())
        rungs = [rung for rung in RUNGS if rung <= bits]
        parities, steps = labels(low, high, max(1, rungs[-1]), True)
        odd = np.cumsum(parities, 1, dtype=np.int64)
        wanted = steps.astype(np.float64) - steps.mean()
        shares: list[float] = []
        for rung in rungs:
            columns = [np.ones_like(size), size - size.mean()]
            if rung:
                columns.append(odd[:, rung - 1].astype(np.float64))
            table = np.stack(columns, 1)
            rest = wanted - table @ np.linalg.lstsq(table, wanted, rcond=None)[0]
            share = 1 - float(rest @ rest) / max(1e-9, float(wanted @ wanted))
            shares.append(max(share, shares[-1] if shares else 0.0))
        return Ladder(tuple(rungs), tuple(shares))

    def bits(self, share: float) -> float:
        """The rung that a model with this R2 stands on; beyond the last one its own R2 is no longer believable."""
        rising = [0]
        rising += [i for i in range(1, len(self.shares)) if self.shares[i] > self.shares[i - 1]]
        return float(np.interp(share, [self.shares[i] for i in rising], [self.rungs[i] for i in rising]))
