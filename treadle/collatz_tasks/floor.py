"""What nobody can do better than: the least cross-entropy and the greatest accuracy of the next step's parity.

The parities of the first L shortcut steps of n and the residue of n mod 2^L determine each other (Terras 1976, Acta Arith.
30), so that a row of parities holds exactly as much information as the random bits of n that it depends on: for n uniform
mod 2^L each parity is a fair coin, ln 2 = .693 nats. Below that on numbers it has not seen, a model was told the answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from treadle.collatz.arithmetic import number
from treadle.collatz_tasks.numbers import FEWEST_BITS, SPAN
from treadle.collatz_tasks.settings import ParityKeys

LN2 = math.log(2)
DENSE = 0.75  # a bit of a dense number is one
DENSE_BITS = -(DENSE * math.log2(DENSE) + (1 - DENSE) * math.log2(1 - DENSE))  # .811


@dataclass(frozen=True)
class Floor:
    """nats: the least mean cross-entropy of a label; accuracy: the greatest mean accuracy. Both on the validation split."""

    nats: float
    accuracy: float


def entropy_mod(count: int, bits: int) -> float:
    """Bits of entropy of a number drawn uniformly from `count` consecutive ones, taken mod 2^bits."""
    whole, rest = divmod(count, 1 << bits)
    found = 0.0
    for times, classes in ((whole + 1, rest), (whole, (1 << bits) - rest)):
        if times and classes:
            found -= classes * times / count * math.log2(times / count)
    return found


def flips(length: int) -> float:
    """Expected number of labels among `length` standard steps that are fair coins: those after an even number (after an odd one
    comes an even one for sure). Tends to 2/3, from the first number even with probability 1/2."""
    even, total = 0.5, 0.0
    for _ in range(length):
        total += even
        even = 1 - even / 2
    return total


def floor_of_kind(keys: ParityKeys, kind: str) -> Floor:
    """The floor on numbers of one kind. The first parity is given; labels are the `length` after it."""
    length = keys.length
    standard = keys.parity_steps == "standard"
    if kind == "dense":
        # Standard steps use up a bit at every second step at least.
        bits = min((length if not standard else length // 2), FEWEST_BITS - 2)
        return Floor(bits * DENSE_BITS * LN2 / length, 1 - bits * (1 - DENSE) / length)
    if kind == "sequential":
        known = entropy_mod(min(number(keys.start), 1 << 62), min(length + 1, 400)) - 1
    elif kind == "above_record":
        known = entropy_mod(SPAN, min(length + 1, 400)) - 1
    elif kind == "three_mod_four":
        known = entropy_mod(SPAN // 4, min(length - 1, 400))
    else:
        known = float(min(length, keys.uniform_bits - 1))
    wanted = flips(length) - (1 if kind == "three_mod_four" else 0) if standard else float(length)
    bits_known = max(0.0, min(known, wanted))
    return Floor(bits_known * LN2 / length, 1 - 0.5 * bits_known / length)


def floor(keys: ParityKeys) -> Floor:
    """The floor on the mixture: the mean over kinds (a model may know which kind a number is)."""
    parts = [(share, floor_of_kind(keys, kind)) for kind, share in keys.shares.items()]
    return Floor(sum(share * part.nats for share, part in parts), sum(share * part.accuracy for share, part in parts))
