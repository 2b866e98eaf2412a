"""The sieve: its bounds in exact fractions, its tables against searches that do not use them, its vectors bit by bit."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from treadle.collatz import sieve
from treadle.collatz.audit import _leads_to
from treadle.collatz.sieve import DOWN, FLOOR, TREE, UP, WINDOW, Rules


def steps(y: int, count: int) -> list[int]:
    path = [y]
    for _ in range(count):
        path.append((3 * path[-1] + 1) >> 1 if path[-1] & 1 else path[-1] >> 1)
    return path


def test_height_of_at_most_zero_is_descent_from_99782_on() -> None:
    # (3 + 1/n)^f < 2^k whenever 485 f <= 306 k; the worst case is equality, f = 306 and k = 485
    def holds(n: int) -> bool:
        return (3 * n + 1) ** 306 < 2**485 * n**306

    assert holds(99_782) and not holds(99_780)
    assert all(3**f < 2**k for k in range(1, 485) for f in range(k) if 485 * f <= 306 * k)


def test_the_floor_leaves_room_for_the_way_back() -> None:
    # one odd step more than the way back has, 20 on the way back: z < n (3 + 1/n) (1 + 1/(3n))^20 / 2^(485/306) < n
    n = FLOOR
    assert (Fraction(3 * n + 1, n) ** 306) * Fraction(3 * n + 1, 3 * n) ** (20 * 306) < 2**485
    assert WINDOW <= 20


def test_scores_are_ways_back_that_exist() -> None:
    chance = random.Random(1)
    scores, useful = Rules(window=8).scores(), 0
    for history in range(2, 2 << 8):
        length = history.bit_length() - 1
        y, f, x = chance.getrandbits(40) << length, 0, 0  # becomes a number with this history
        for place in range(length):
            odd = history >> (length - 1 - place) & 1
            if x & 1 != odd:
                y, x = y + 2**place, x + 3**f
            x, f = ((3 * x + 1) // 2, f + 1) if odd else (x // 2, f)
        path = steps(y, length)
        assert [n & 1 for n in path[:-1]] == [history >> (length - 1 - i) & 1 for i in range(length)]
        if scores[history] > 1:
            useful += 1
            bound = int(path[-1] * 2 ** (-scores[history] / 306) * (1 + 1e-4)) + 1
            assert _leads_to(path[-1], path[-2], bound), (history, scores[history])
    assert useful == 99


def test_odd_even_even_is_the_shortest_way_back() -> None:
    scores = TREE.scores()
    assert scores[0b11] == 1 and scores[0b110] == 1  # after one odd step, or one even more, the only way is one's own
    assert scores[0b1100] == UP  # z = (y - 1) / 4 comes to the same number in one odd step
    assert scores[0b100] == 1  # the odd step has to be inside the window: two even steps say nothing


def test_residues_have_smaller_predecessors_and_hold_all_of_modulo_nine() -> None:
    residues = TREE.residues()
    assert {r for r in range(729) if r % 9 in (2, 4, 5, 8)} < residues
    chance = random.Random(2)
    for residue in residues:
        n = residue + 729 * chance.getrandbits(60)
        assert _leads_to(n, 0, n), residue
    assert len(residues) == 335


def test_history_keeps_its_leading_one() -> None:
    history = 1
    for place in range(30):
        history = sieve.extend(history, place & 1, 12)
        assert history.bit_length() == min(place + 2, 13)


def test_units_partition_the_tree() -> None:
    whole = sorted(sieve.leaves(5, 18, 0, 0))
    parts = sorted(leaf for prefix in range(64) for leaf in sieve.leaves(5, 18, prefix, 6))
    assert whole == parts and len(whole) > 100
    for prefix in range(64):
        if sieve.excluded(prefix, 6):
            assert not list(sieve.leaves(5, 18, prefix, 6))
    for r, x, f, height in whole:
        path = steps(r, 12)
        odd = sum(n & 1 for n in path[:-1])
        assert (x, f, height) == (path[-1], odd, 485 * odd - 306 * 12)
        assert height == sieve.height(r, 12) and height > 0


def test_bit_vectors_are_the_reference_bit_by_bit() -> None:
    kernel_unit = pytest.importorskip("treadle.collatz.kernel_unit", exc_type=ImportError)
    for bits in (14, 36):
        tables = kernel_unit._tables(bits, TREE)
        end, ahead = sieve.depth(bits), sieve.lookahead(bits)
        chance, seen = random.Random(3), [0, 0]
        for row in range(len(tables.vectors)):
            f = tables.least + row
            for i in (chance.getrandbits(ahead) for _ in range(300)):
                bit = int(tables.vectors[row, i >> 6]) >> (i & 63) & 1
                assert bit == sieve.passes(3**f * i, UP * f - DOWN * (end - f), ahead), (bits, f, i)
                seen[bit] += 1
        assert min(seen) > 100
