"""Cycles by algebra and by following: known ones are found, on every path, and only what is not known is news."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.collatz import compiled
from treadle.collatz.arithmetic import Map
from treadle.collatz.cycle_search import (
    BELOW,
    CYCLE,
    UNRESOLVED,
    Limits,
    Totals,
    chunks,
    examine,
    examine_one,
    follow,
    settle,
)
from treadle.collatz.cycles import Cycle, algebraic_cycles, cycle_through, lyndon_words, start_of
from treadle.collatz.known_cycles import PRIMITIVE, Discovery, discovery, known, recomputed, was_searched
from treadle.errors import ConfigError

PATHS = ["python"] + (["numba"] if compiled.load("cycles_numba") is not None else [])
THIRTEEN = [1, 13, -13, -65, 131, 211, -221, 227, 251, 259, 283, 287, 319]


def representatives(cycles: list[Cycle]) -> list[int]:
    return [cycle.representative for cycle in cycles]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("map, length, cycles", [
    ("3x+1", 18, [0, 1, -1, -5, -17]),
    ("5x+1", 18, [0, 1, -1, 13, 17]),
    ("181x+1", 15, [0, 27, 35]),
    ("3x+5", 17, [0, 1, 5, -5, 19, 23, -25, -85]),
    ("3x-1", 12, [0, 1, -1, 5, 17]),
    ("1x+7", 9, [0, 1, 3, 7]),
])  # fmt: skip
def test_by_algebra(map: str, length: int, cycles: list[int], path: str) -> None:
    found = algebraic_cycles(Map.parse(map), length, path)
    assert representatives(found) == cycles and all(cycle.holds() for cycle in found)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 100).map(lambda k: 2 * k + 1), st.integers(-200, 200).map(lambda k: 2 * k + 1), st.integers(1, 11))
def test_algebra_finds_what_following_finds(q: int, c: int, length: int) -> None:
    """And on every path the same. Cycles of a few steps have small members: |n| <= |c| q^length."""
    map = Map(q, c)
    by_path = [algebraic_cycles(map, length, path) for path in PATHS]
    assert all(found == by_path[0] for found in by_path)
    near = {cycle_through(map, n, length) for n in range(-300, 301)} - {None}
    assert {cycle for cycle in by_path[0] if abs(cycle.representative) <= 300} == near


def test_the_words() -> None:
    words = ["".join(map(str, word)) for word in lyndon_words(8)]
    lengths = [len(word) for word in words]
    assert [lengths.count(n) for n in range(1, 9)] == [2, 1, 2, 3, 6, 9, 18, 30]  # OEIS A001037
    assert words == sorted(words) and all(word < word[k:] + word[:k] for word in words for k in range(1, len(word)))
    assert start_of([1, 0], Map(3, 1)) == 1 and start_of([1, 1, 0], Map(3, 1)) == -5 and start_of([1, 0, 0], Map(3, 1)) is None


@pytest.mark.parametrize("path", PATHS)
def test_by_following(path: str) -> None:
    five = examine(Map(3, 5), -3000, 3001, path=path)
    assert five is not None and set(five.cycles) == {0, 1, 5, 19, 23, 187, 347, -5, -25, -85} and five.unresolved_count == 0
    assert [cycle_through(Map(3, 5), n).shortcut_steps for n in (187, 347)] == [27, 27]  # type: ignore[union-attr]
    thirteen = examine(Map(3, 13), -3000, 3001, path=path, threads=2)
    assert thirteen is not None and list(thirteen.cycles) == [0, *THIRTEEN]
    assert cycle_through(Map(3, 13), 131) == Cycle(Map(3, 13), 131, 24, 15)


def test_both_paths_say_the_same_of_any_numbers() -> None:
    """Across limbs, signs, overflows, factors beyond the compiled loop, and limits inside and beyond it."""
    random_numbers = random.Random(5)
    for _ in range(60):
        q = random_numbers.choice([1, 3, 3, 3, 5, 7, 2**31 - 1, 2**33 + 1])
        map = Map(q, random_numbers.choice([1, -1, 3, -17, 1001, -(2**31) + 1, 2**35 + 1]))
        start = random_numbers.randrange(-(2 ** random_numbers.randrange(1, 130)), 2 ** random_numbers.randrange(1, 130))
        limits = Limits(2000, random_numbers.choice([40, 63, 64, 65, 126, 127, 128, 300]))
        plain = Totals()
        for n in range(start, start + 40):
            plain = plain.merge(examine_one(n, map, limits))
        for path in PATHS:
            assert examine(map, start, start + 40, limits, path) == plain, (path, map, start, limits)


THIRD = pow(3, -1, 1 << 64)  # 3 THIRD = 1 modulo 2^64, so a carry or a borrow of c goes into the upper limb


@pytest.mark.parametrize("map, start", [
    (Map(3, 1), (5 << 64) + (1 << 64) - THIRD), (Map(3, 7), (5 << 64) + (1 << 64) - 3 * THIRD),
    (Map(3, -3), (5 << 64) + THIRD), (Map(3, -5), -(7 << 64) - 3 * THIRD),
    (Map(3, 1), (7 << 64) - 20), (Map(3, -1), (1 << 64) - 20), (Map(3, 1), (1 << 126) - 20), (Map(3, -13), -20),
    (Map(1, -(2**31) + 1), 10**9), (Map(3, -(2**31) + 1), 5 * 10**8),
])  # fmt: skip
def test_both_paths_agree_at_the_edges_of_limbs(map: Map, start: int) -> None:
    for low, high in [(start - 3, start + 40), *((n, n + 1) for n in range(start - 3, start + 25))]:
        by_path = [examine(map, low, high, path=path) for path in PATHS]
        assert all(found == by_path[0] for found in by_path)


def test_the_reference_itself() -> None:
    limits = Limits()
    assert follow(7, Map(), limits) == (BELOW, 5, 4, 52)
    assert follow(-17, Map(), limits)[0] == CYCLE and follow(0, Map(), limits)[0] == CYCLE
    assert follow(187, Map(3, 5), limits)[0] == CYCLE
    outcome, x, _, most = follow(7, Map(5, 1), Limits(bits=200))
    assert outcome == UNRESOLVED and x.bit_length() == 201 and most > x
    assert follow(27, Map(), Limits(steps=58))[0] == UNRESOLVED and follow(27, Map(), Limits(steps=59))[0] == BELOW  # A020914's 59


@pytest.mark.parametrize("path", PATHS)
def test_what_grows_is_reported(path: str) -> None:
    """Under 5x + 1 seven is the first number that nobody has seen come back."""
    found = examine(Map(5, 1), 1, 30, path=path)
    assert found is not None and found.cycles == (1, 13, 17) and found.unresolved == (7, 9, 21, 23, 25, 29) and found.numbers == 29
    many = examine(Map(5, 1), -4000, 4000, path=path)
    assert many is not None and many.unresolved_count > 1000 == len(many.unresolved)


def test_pieces() -> None:
    map, found, at = Map(5, 1), [], -3_000_000
    for start, end in chunks(map, at, 3_000_000):
        assert start == at
        found.append(end)
        at = end
    assert at == 3_000_000 and len(found) > 2
    assert settle(Map(3, 5), -500, 501, path="python") == examine(Map(3, 5), -500, 501)
    assert examine(Map(3, 5), 1, 2**40, stopping=lambda: True) is None


def test_a_cycle_that_is_none_does_not_hold() -> None:
    cycle = Cycle(Map(3, 5), 187, 27, 17)
    assert cycle.holds()
    for wrong in ({"representative": 349}, {"representative": 283}, {"shortcut_steps": 54, "odd_steps": 34}, {"odd_steps": 16},
                  {"map": Map(3, 7)}, {"shortcut_steps": 26}):  # fmt: skip
        assert not replace(cycle, **wrong).holds()


# ---- what is known


@pytest.mark.parametrize("row", PRIMITIVE, ids=lambda row: f"{row[0]}x+{row[1]}")
def test_the_table_again(row: tuple[int, int]) -> None:
    """Each entry is a cycle, named by its least member; a smaller search finds nothing else."""
    for n in PRIMITIVE[row]:
        cycle = cycle_through(Map(*row), n)
        assert cycle is not None and cycle.holds() and cycle.representative == n
    within = recomputed(*row, largest=1500, length=11)
    assert {n for n in PRIMITIVE[row] if abs(n) <= 1500} <= set(within) <= set(PRIMITIVE[row])


@pytest.mark.slow
def test_the_whole_table_again() -> None:
    rows = [(3, c) for c in range(1, 100, 2)] + [(5, c) for c in range(1, 50, 2)] + [(7, c) for c in range(1, 30, 2)]
    rows += [(q, 1) for q in range(9, 200, 2)]
    for row in rows:
        assert recomputed(*row) == PRIMITIVE.get(row, ()), row


def test_multiples_and_mirror_images_are_known() -> None:
    assert known(Map(3, 1)) == {0, 1, -1, -5, -17} and known(Map(3, -1)) == {0, -1, 1, 5, 17}
    assert known(Map(3, 13)) == {0, *THIRTEEN} and known(Map(3, 3)) == {0, 3, -3, -15, -51}
    assert {5 * 131, 13 * 187, 65} < known(Map(3, 65)) and 131 not in known(Map(3, 65))
    assert known(Map(3, 1001)) == {0, *(143 * n for n in known(Map(3, 7))), *(91 * n for n in known(Map(3, 11))),
                                   *(77 * n for n in known(Map(3, 13))), *(13 * n for n in known(Map(3, 77))),
                                   *(11 * n for n in known(Map(3, 91)))}  # fmt: skip
    assert was_searched(Map(3, -99)) and was_searched(Map(3, 297)) and not was_searched(Map(3, 101)) and not was_searched(Map(5, 51))


def test_only_what_is_not_known_is_news() -> None:
    limits = Limits()
    for n in (1, 13, 131, 319, -221, 133, 5):  # members, and numbers that come down
        assert discovery(Map(3, 13), n, limits) is None
    found = discovery(Map(3, 13), 131, limits, known(Map(3, 13)) - {131})
    assert found == Discovery(Map(3, 13), 131, Cycle(Map(3, 13), 131, 24, 15))
    assert Discovery.from_dict(found.as_dict()) == found and "24 shortcut steps" in str(found)
    # A number that is given up is news under 3x + c, and nothing special where all grow.
    never = discovery(Map(), 27, Limits(steps=20, bits=99))
    assert never == Discovery(Map(), 27, None, 20, 99) and Discovery.from_dict(never.as_dict()) == never
    assert discovery(Map(5, 1), 7, Limits(bits=120)) is None


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="1 to 48"):
        algebraic_cycles(Map(), 49)
    with pytest.raises(ConfigError, match="no path"):
        algebraic_cycles(Map(), 5, "fast")
    with pytest.raises(ConfigError, match="A <= B"):
        examine(Map(), 5, 4)
