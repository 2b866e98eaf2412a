"""Which numbers of a block need not be followed, because a smaller number answers for them.

The shortcut map is T; T^k(r + a 2^k) = T^k(r) + 3^f a, where f counts the odd ones among the first k numbers (Terras 1976,
Acta Arith. 30). A node of the tree is a residue r mod 2^k with its x = T^k(r) and f, so a rule that reads only k and the
parities so far decides for a whole class. Its height is E = 485 f - 306 k: 485/306 is just above log2 3 = 1.58496..., so

    E <= 0  and  n > 99,781   =>   T^j(n) < n for some j <= k                                                   (descent)

since as long as nothing has come below n, T^k(n) <= n (3 + 1/n)^f / 2^k and 1 / (2^(485/306) - 3) = 99,781.2.

Merging: the last parities of a path, o of them odd, fix w = T^k(n) modulo 3^o, and with it which numbers lead to w along
another branch. One that comes to w in l steps of which m are odd is z < w 2^l / 3^m, below n when E < 485 m - 306 l. The
pattern odd-even-even is the shortest case, z = (y - 1) / 4 (the rules of Angeltveit, arXiv 2602.10466, are of this kind);
`scores` holds the best for every history of up to WINDOW parities. A history begins with the walk, never before it: what
lies before an odd number inside the window is known modulo 3 only because that odd step was seen.

Preimages: n itself has such a z whenever its residue modulo 729 says so: 2 and 4, 5, 8 modulo 9 and some more.

Every z and every descent is smaller than n, so if all numbers below n reach 1, n does. FLOOR is where the bounds above hold
with room for m <= 20: 99,782 (1 + 20) < 2^21.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

UP, DOWN = 485 - 306, 306  # what an odd and an even step do to the height E
FLOOR = 1 << 21  # numbers below are followed themselves
WINDOW = (
    12  # parities; 8: 13 % more numbers are left, 14: 3 % fewer, but its table no longer fits beside the others in L1
)
TERNARY = 729  # modulo 9 alone leaves 2.8 % more
WORD = 6  # a leaf of the tree stands for 2^6 numbers, one machine word of the bit-vectors
HIGHEST = 4096  # leaves with a greater height (13 doublings) skip the bit-vectors, which would let nearly all pass


@dataclass(frozen=True)
class Rules:
    """What a run excludes. "tree" and "descent" prove something; the others show that the audit notices a wrong sieve.

    Where 64 high is a multiple of 2^lookahead, as for the block at 2^68, "broken" happens to be right.
    """

    name: str = "tree"
    window: int = WINDOW
    preimages: bool = True
    with_high: bool = True  # False: the block's own offset is left out of the index into the bit-vectors
    turn: int = 0  # words of preimages turned by this many residues
    slack: int = 0  # added to every bound on the height

    def scores(self) -> tuple[int, ...]:
        """By history, a 1 and then up to `window` parities, newest last: a node is excluded when its E is below this."""
        found = _scores(self.window)
        return tuple(score + self.slack for score in found) if self.slack else found

    def residues(self) -> frozenset[int]:
        """The n mod TERNARY that have a smaller predecessor."""
        if not self.preimages:
            return frozenset()
        return frozenset((residue + self.turn) % TERNARY for residue in _residues())


TREE = Rules()
DESCENT = Rules("descent", window=0, preimages=False)  # for comparison: 3 times as many numbers are left
RULES = {rules.name: rules for rules in (TREE, DESCENT, Rules("broken", with_high=False))}


@lru_cache
def _scores(window: int) -> tuple[int, ...]:
    scores = [1] * (2 << window)  # E < 1 is descent, without any history
    for history in range(2, 2 << window):
        x, f = 0, 0  # T^j of the least number with these parities, and its odd steps
        for place in range(history.bit_length() - 2, -1, -1):
            odd = history >> place & 1
            if x & 1 != odd:
                x += 3**f
            x, f = ((3 * x + 1) >> 1, f + 1) if odd else (x >> 1, f)
        if history & 1:  # its own way back is (2 x - 1) / 3, so another begins with 2 x
            scores[history] = _best(2 * x % 3**f, f, -DOWN)
        elif x % 3 == 2 and f:
            scores[history] = _best((2 * x - 1) // 3 % 3 ** (f - 1), f - 1, UP)
    return tuple(scores)


def _best(residue: int, room: int, score: int) -> int:
    """The greatest 485 m - 306 l over the numbers that lead to one known modulo 3^room; at least 1."""
    best = 1
    todo = [(residue, room, score)]
    while todo:
        residue, room, score = todo.pop()
        best = max(best, score)
        if room and score + UP * room > best:
            todo.append((2 * residue % 3**room, room, score - DOWN))
            if residue % 3 == 2:
                todo.append(((2 * residue - 1) // 3 % 3 ** (room - 1), room - 1, score + UP))
    return best


@lru_cache
def _residues() -> frozenset[int]:
    return frozenset(residue for residue in range(TERNARY) if _best(residue, 6, 0) > 1)


def depth(bits: int) -> int:
    """Where the tree of a block ends."""
    return bits - WORD


def lookahead(bits: int) -> int:
    """Steps that the bit-vectors see past the tree. Small blocks, for tests, do with small vectors.

    22 and 24 leave 12 and 23 % fewer numbers of 2^36 and take as long: vectors of 2^20 bits stay in L2.
    """
    return 20 if bits >= 30 else 12


def extend(history: int, odd: int, window: int) -> int:
    """The history with one more parity; the leading 1 stays where `window` parities are known."""
    history = history << 1 | odd
    return history & ((1 << window) - 1) | 1 << window if history >> window + 1 else history


def leaves(
    high: int, bits: int, prefix: int, prefix_bits: int, rules: Rules = TREE
) -> Iterator[tuple[int, int, int, int]]:
    """(r, x, f, E) of the residues mod 2^depth(bits) that agree with the prefix and are not excluded, smallest branch first."""
    scores, end = rules.scores(), depth(bits)
    stack = [(0, 0, 0, 0, 0, 1)]
    while stack:
        k, r, x, f, height, history = stack.pop()
        if k == end:
            yield r, x, f, height
            continue
        for bit in (prefix >> k & 1,) if k < prefix_bits else (1, 0):
            y = x + 3**f if bit else x
            odd = y & 1
            after = height + (UP if odd else -DOWN)
            past = extend(history, odd, rules.window)
            if after >= scores[past]:
                stack.append((k + 1, r | bit << k, (3 * y + 1) >> 1 if odd else y >> 1, f + odd, after, past))


def passes(y: int, height: int, steps: int, rules: Rules = TREE) -> bool:
    """Whether T^k(n) = y with this height gets through the next steps without being excluded: one bit of the bit-vectors."""
    return height > HIGHEST or _lasts(y, height, steps, rules)


def _lasts(y: int, height: int, steps: int, rules: Rules) -> bool:
    """Whether none of the next steps from y, at this height and without a history, is excluded."""
    scores, history = rules.scores(), 1
    for _ in range(steps):
        odd = y & 1
        height += UP if odd else -DOWN
        history = extend(history, odd, rules.window)
        if height < scores[history]:
            return False
        y = (3 * y + 1) >> 1 if odd else y >> 1
    return True


def survivors(leaf: tuple[int, int, int, int], high: int, bits: int, rules: Rules = TREE) -> Iterator[int]:
    """The numbers of one leaf, in the block [high 2^bits, (high + 1) 2^bits), that have to be followed."""
    r, x, f, height = leaf
    end, steps, residues = depth(bits), lookahead(bits), rules.residues()
    for b in range(1 << WORD):
        a = (high << WORD) + b
        n = r + (a << end)
        if n % TERNARY not in residues and passes(x + 3**f * (a if rules.with_high else b), height, steps, rules):
            yield n


def excluded(prefix: int, prefix_bits: int, rules: Rules = TREE) -> bool:
    """Whether the tree leaves out every n = prefix mod 2^prefix_bits that is at least FLOOR."""
    return not _lasts(prefix, 0, prefix_bits, rules)


def height(prefix: int, prefix_bits: int) -> int:
    """E of the residue after as many steps as it has bits: the greater, the more of its numbers are left."""
    found, y = 0, prefix
    for _ in range(prefix_bits):
        found, y = (found + UP, (3 * y + 1) >> 1) if y & 1 else (found - DOWN, y >> 1)
    return found
