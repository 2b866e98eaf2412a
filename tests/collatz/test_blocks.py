"""Blocks: known totals, one answer on every path, and nothing lost between units."""

from __future__ import annotations

import importlib.util
import random

import pytest

from treadle.collatz import arithmetic, blocks, sieve
from treadle.collatz.blocks import Totals, Unit, candidates, direct, follow, run_unit, units
from treadle.errors import ConfigError, MissingExtra

START = 1 << 68
FAST = [path for path in blocks.installed() if path != "python"]


def whole(high: int, bits: int, path: str = "auto", kind: str = "tree") -> Totals:
    return Totals.total(run_unit(unit, path, kind) for unit in units(high, bits, kind))


@pytest.mark.parametrize("path", blocks.installed())
def test_known_block_without_a_sieve(path: str) -> None:
    """Barina's worker on [2^68, 2^68 + 2^20), n = 3 mod 4. Its maximum is of shortcut steps, half of 3 n + 1."""
    if path == "numpy":
        pytest.skip("numpy follows every number in integers, as python does")
    found = whole(1 << 48, 20, path, "none")
    assert found.odd_steps == 1563960 and found.candidates == 1 << 18
    assert (found.maximum, found.argmax - START) == (2 * 15917322219892810369972748, 159487)


def test_descent_alone_keeps_the_maximum_and_leaves_three_times_as_many() -> None:
    found, descent = whole(1 << 48, 20), whole(1 << 48, 20, kind="descent")
    assert (descent.maximum, descent.argmax - START) == (2 * 15917322219892810369972748, 159487)
    assert found.candidates < descent.candidates / 2.5 and found.maximum <= descent.maximum


@pytest.mark.slow
def test_known_maximum_of_2_to_the_36_numbers() -> None:
    """Numbers that come below themselves within 50 steps meet nothing above 2 (3/2)^50 n, so descent alone leaves the maximum."""
    pytest.importorskip("numba")
    for kind in ("descent", "tree"):
        found = whole(1 << 32, 36, "numba", kind)
        assert (found.maximum, found.argmax - START) == (2 * 387840540475247598688632659337752, 13658232575)
        assert not found.overflow and not found.unresolved


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("seed", range(6))
def test_paths_agree_on_random_blocks(path: str, seed: int) -> None:
    chance = random.Random(seed)
    bits, high = chance.randint(10, 17), chance.getrandbits(chance.randint(1, 60))
    for kind in ("tree", "broken", "descent"):
        for unit in chance.sample(units(high, bits), 3):
            assert run_unit(unit, path, kind) == run_unit(unit, "python", kind), (unit, kind)
            if unit.start >= sieve.FLOOR:
                assert candidates(unit, path, kind) == candidates(unit, "python", kind)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("bits", [32, 36, 40])
def test_paths_agree_on_parts_of_large_blocks(path: str, bits: int) -> None:
    chance, width = random.Random(bits), bits - 15
    for high in (0, 1 << (68 - bits), chance.getrandbits(60)):
        some = (chance.getrandbits(width) for _ in range(10_000))
        prefix = next(prefix for prefix in some if not sieve.excluded(prefix, width))
        unit = Unit(high, bits, prefix, width)
        found = run_unit(unit, path)
        assert found == run_unit(unit, "python") and found.candidates > 30


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("exponent", [66, 88, 102, 104, 120, 200])
def test_what_exceeds_128_bits_is_listed_on_every_path(path: str, exponent: int) -> None:
    """2^e - 1 climbs to 3^e - 1; the unit also holds numbers that do not, near the limits of the compiled path."""
    n = (1 << exponent) - 1
    unit = Unit(n >> 14, 14, n & 31, 5)
    reference = run_unit(unit, "python")
    assert run_unit(unit, path) == reference
    assert bool(reference.overflow) == (exponent > 80) and not reference.unresolved
    if n in candidates(unit, "python"):
        assert reference.maximum >= 2 * (3**exponent - 1)


def test_small_numbers_are_followed_themselves() -> None:
    found = whole(0, 12, "python")
    assert found.candidates == 1 << 10 and found.leaves == 0
    assert (found.maximum, found.argmax) == (1276936, 1819)
    across = Unit(0, 22, 27, 8)  # on both sides of the floor
    reference = run_unit(across, "python")
    assert reference.leaves > 0 and reference.candidates > sum(1 for n in across.first(3, 2) if n < sieve.FLOOR)
    for path in FAST:
        assert run_unit(across, path) == reference


def test_one_candidate_in_integers() -> None:
    assert direct(27) == Totals(0, 1, 0, 37, 9232, 27)
    assert direct(27).maximum == arithmetic.maximum(27)
    n = 13658232575 + START
    found = follow(n, 30)
    assert found.maximum == 2 * 387840540475247598688632659337752
    assert found.odd_steps == sum(arithmetic.parities(n, 30 + 32 + 16 * (found.jumps - 1)))
    height = [485 * sum(arithmetic.parities(n, k)) - 306 * k for k in range(62, 62 + 16 * found.jumps, 16)]
    assert height[-1] <= 0 < min(height[:-1])


def test_a_number_that_does_not_come_down_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MOST_STEPS", 90)
    unit = next(unit for unit in units(1 << 48, 20) if unit.prefix == 27)
    found = run_unit(unit, "python")
    assert found.unresolved and set(found.unresolved) < set(candidates(unit, "python"))
    assert direct(63728127).unresolved == (63728127,)
    monkeypatch.undo()
    assert not run_unit(unit, "python").unresolved


def test_totals_merge_in_any_order() -> None:
    chance = random.Random(0)
    parts = [run_unit(unit, "python") for unit in units(77777, 12)]
    parts += [
        Totals(1, 2, 3, 4, parts[0].maximum, parts[0].argmax + 1, (9, 11), (5,)),
        Totals(overflow=(10,)),
        Totals(),
    ]
    expected = Totals.total(parts)
    for _ in range(5):
        chance.shuffle(parts)
        assert Totals.total(parts) == expected
    assert expected.overflow == (9, 10, 11)
    assert Totals(maximum=8, argmax=3).merge(Totals(maximum=8, argmax=2)).argmax == 2


def test_totals_as_json_and_back() -> None:
    found = Totals(1, 2, 3, 4, 1 << 200, 1 << 90, (1 << 130,), (7,))
    assert Totals.from_dict(found.as_dict()) == found
    good = found.as_dict()
    for name, value in (
        ("leaves", -1),
        ("leaves", True),
        ("leaves", "1"),
        ("maximum", 5),
        ("argmax", "-5"),
        ("overflow", ["x"]),
    ):
        with pytest.raises(ValueError):
            Totals.from_dict({**good, name: value})


def test_units_are_deterministic_and_leave_nothing_out() -> None:
    found = units(3 << 40, 20)
    assert found == units(3 << 40, 20) and len({unit.prefix for unit in found}) == len(found) == 16
    assert {unit.prefix for unit in units(0, 20)} == set(range(256))  # below the floor the sieve says nothing
    left_out = set(range(256)) - {unit.prefix for unit in found}
    assert all(run_unit(Unit(3 << 40, 20, prefix, 8)) == Totals() for prefix in left_out)
    whole_unit = run_unit(Unit(3 << 40, 20, 0, 0))
    assert whole_unit == Totals.total(run_unit(unit) for unit in found)
    assert sum(unit.size for unit in units(0, 20)) == 1 << 20


def test_nonsense_is_refused() -> None:
    for high, bits, prefix, width in (
        (0, 7, 0, 0),
        (0, 45, 0, 0),
        (-1, 20, 0, 0),
        (0, 20, 4, 2),
        (0, 20, 0, 15),
        (1 << 990, 20, 0, 0),
    ):
        with pytest.raises(ConfigError):
            Unit(high, bits, prefix, width)
    unit = Unit(1 << 40, 12, 27, 5)
    with pytest.raises(ConfigError, match="auto, numba, numpy, python"):
        run_unit(unit, "gpu")
    with pytest.raises(ConfigError, match="tree, descent and none"):
        run_unit(unit, "python", "colander")
    with pytest.raises(ConfigError):
        candidates(unit, "python", "none")


def test_a_tree_that_may_have_passed_the_maximum_marks_its_numbers() -> None:
    """Few blocks depend on it: the largest number would have to lie above the tree's last node by ten doublings."""
    np, kernel = pytest.importorskip("numpy"), pytest.importorskip("treadle.collatz.kernel", exc_type=ImportError)
    U = np.uint64
    f, word = np.array([24, 20]), np.array([0b1011, 0b110], U)
    low, record, marked = np.empty(128, U), np.empty(128, np.int64), np.empty(128, np.int64)
    bar = (179 * 24 + 306 - kernel.WITHIN) << 40  # what 24 odd steps can reach, 20 cannot
    found, marks = kernel.spread(
        2,
        np.array([5, 9], U),
        f,
        np.array([300, 200]),
        word,
        U(1),
        np.array([3**i for i in range(40)], U),
        low,
        record,
        bar,
        marked,
    )
    assert (found, marks) == (5, 3) and list(marked[:3]) == [0, 1, 3]
    assert list(record[:5]) == [300 << 40, 300 << 40 | 1, 300 << 40 | 3, 200 << 40 | 64 | 1, 200 << 40 | 64 | 2]
    assert [int(y) for y in low[:2]] == [5 + 3**24 & (1 << 48) - 1, 5 + 2 * 3**24 & (1 << 48) - 1]


def test_without_numba_the_arrays_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else found(name))
    blocks.installed.cache_clear()
    try:
        assert blocks.installed() == ("numpy", "python") and blocks.resolved("auto") == "numpy"
        unit = units(1 << 40, 14)[0]
        assert run_unit(unit) == run_unit(unit, "python")
        with pytest.raises(MissingExtra, match=r"treadle\[collatz\]"):
            run_unit(unit, "numba")
    finally:
        blocks.installed.cache_clear()
