"""Which numbers a run sees: exact, disjoint, a pure function of the row; and what nobody can know of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from treadle.collatz.arithmetic import parities
from treadle.collatz_tasks.floor import entropy_mod, flips, floor, floor_of_kind
from treadle.collatz_tasks.numbers import NumberSource, digit_count, digits, split_of
from treadle.collatz_tasks.settings import KINDS, NumberKeys, ParityKeys
from treadle.errors import ConfigError
from treadle.settings import build_section

EQUAL = dict.fromkeys(KINDS, 1.0)


def drawn(split: int, rows: int = 3000, seed: int = 0, **keys: object) -> tuple[list[str], list[int]]:
    numbers = NumberSource(NumberKeys(mixture=EQUAL, **keys), seed, split).numbers(np.arange(rows))
    return [KINDS[kind] for kind in numbers.kinds], [numbers.exact(row) for row in range(rows)]


def test_kinds_are_what_they_say() -> None:
    for split, record, dense, start, bits in ((0, 2**68, (70, 119), 2**40, 68), (1, 2**68, (70, 119), 2**40, 68), (2, 2**71, (120, 125), 2**52, 71)):
        kinds, numbers = drawn(split)
        by_kind = {kind: [n for k, n in zip(kinds, numbers) if k == kind] for kind in KINDS}
        assert all(len(own) > 500 for own in by_kind.values())
        assert all(record <= n < record + 10**12 + 4 for n in by_kind["above_record"] + by_kind["three_mod_four"])
        assert all(n % 4 == 3 for n in by_kind["three_mod_four"]) and {n % 4 for n in by_kind["above_record"]} == {0, 1, 2, 3}
        assert {n.bit_length() for n in by_kind["dense"]} == set(range(dense[0], dense[1] + 1))
        ones = sum(n.bit_count() - 1 for n in by_kind["dense"]) / sum(n.bit_length() - 1 for n in by_kind["dense"])
        assert ones == pytest.approx(0.75, abs=0.01)
        assert all(n.bit_length() == bits + 1 for n in by_kind["uniform"])
        assert all(start <= n < 2 * start + 40 for n in by_kind["sequential"])


def test_sequential_numbers_are_counted_up_and_none_is_left_out() -> None:
    """Row after row; together with what is kept for validation and the test, all neighbours."""
    source = NumberSource(NumberKeys(hard_share=0.0, start="2^40"), 3, 0)
    numbers = source.numbers(np.arange(5000))
    found = numbers.low.tolist()
    assert found == sorted(set(found)) and found[0] >= 2**40
    every = np.arange(found[0], found[-1] + 1, dtype=np.uint64)
    assert found == every[split_of(every, np.zeros_like(every)) == 0].tolist()
    assert 0.88 < len(found) / len(every) < 0.92


def test_splits_never_meet() -> None:
    seen = {split: set(drawn(split, 4000, seed, start="2^20", uniform_bits=12)[1]) for split, seed in ((0, 0), (1, 5), (2, 9))}
    assert all(not a & b for a, b in itertools.combinations(seen.values(), 2))
    for split, numbers in seen.items():
        low, high = (np.array([n >> shift & (2**64 - 1) for n in numbers], dtype=np.uint64) for shift in (0, 64))
        assert (split_of(low, high) == split).all()


def test_a_number_is_a_function_of_its_row() -> None:
    source = NumberSource(NumberKeys(mixture=EQUAL), 7, 0)
    whole, part = source.numbers(np.arange(2000)), source.numbers(np.array([1999, 3, 1024]))
    for row, place in ((1999, 0), (3, 1), (1024, 2)):
        assert whole.exact(row) == part.exact(place) and whole.kinds[row] == part.kinds[place]
    other = NumberSource(NumberKeys(mixture=EQUAL), 8, 0).numbers(np.arange(2000))
    assert (other.low != whole.low).mean() > 0.7


def test_a_batch_is_mixed_by_the_shares() -> None:
    kinds = NumberSource(NumberKeys(hard_share=0.25), 0, 0).numbers(np.arange(1024)).kinds
    assert (kinds == KINDS.index("sequential")).sum() == 768


@pytest.mark.parametrize("base", [2, 3, 10, 24, 1000])
def test_digits_are_exact(base: int) -> None:
    numbers = [0, 1, base - 1, 2**64 - 1, 2**64, 2**119 + 12345678901234567890, 3**70]
    low, high = (np.array([n >> shift & (2**64 - 1) for n in numbers], dtype=np.uint64) for shift in (0, 64))
    count = digit_count(max(numbers), base)
    found = digits(low, high, base, count)
    assert [sum(d * base**i for i, d in enumerate(row)) for row in found.tolist()] == numbers
    assert found.max() < base and found[-2 if base == 2 else -1].any()


def test_what_is_wrong_is_said() -> None:
    for keys, words in (({"mixture": {"prime": 1.0}}, "there is: sequential"), ({"start": 1}, "between 2"), ({"start": "two"}, "is not a number"),
                        ({"mixture": {"dense": -1.0}}, "no share"), ({"search_map": "4x+1"}, "odd q")):  # fmt: skip
        with pytest.raises((ConfigError, ValueError), match=words):
            NumberKeys(**keys)
    assert build_section and NumberKeys(start=2**70).start == "2^70"


# ---- the floor ----


def exact_floor(residues: list[int], modulus_bits: int, length: int, shortcut: bool) -> float:
    """Entropy in nats of the parities 1 .. length given parity 0, over equally likely starts, by counting."""
    counts: dict[tuple[int, ...], int] = {}
    for n in residues:
        row = tuple(parities(n + (1 << modulus_bits + 4), length + 1, shortcut))
        counts[row] = counts.get(row, 0) + 1
    first: dict[int, int] = {}
    for row, count in counts.items():
        first[row[0]] = first.get(row[0], 0) + count
    total = len(residues)
    joint = -sum(c / total * math.log(c / total) for c in counts.values())
    return (joint + sum(c / total * math.log(c / total) for c in first.values())) / length


def test_the_floor_is_the_entropy_of_the_parities() -> None:
    """Terras: over all residues mod 2^(L + 1) the shortcut parities are fair coins, .693; in standard steps two thirds of them."""
    assert exact_floor(list(range(2**11)), 11, 10, True) == pytest.approx(math.log(2))
    keys = ParityKeys(mixture={"uniform": 1.0}, length=10)
    assert floor(keys).nats == pytest.approx(math.log(2)) and floor(keys).accuracy == pytest.approx(0.5)
    standard = ParityKeys(mixture={"uniform": 1.0}, length=10, parity_steps="standard")
    by_count = exact_floor(list(range(2**12)), 12, 10, False)
    assert floor(standard).nats == pytest.approx(by_count, abs=1e-9) == pytest.approx(flips(10) / 10 * math.log(2), abs=1e-9)
    long = floor(ParityKeys(mixture={"uniform": 1.0}, length=60, parity_steps="standard"))
    assert long.nats == pytest.approx(0.462, abs=2e-3) and long.accuracy == pytest.approx(0.667, abs=2e-3)
    forced = [n for n in range(2**11) if n % 4 == 3]
    assert floor_of_kind(ParityKeys(length=10), "three_mod_four").nats == pytest.approx(exact_floor(forced, 11, 10, True), abs=1e-4)


def test_the_floor_counts_only_bits_that_are_random() -> None:
    """Twelve random bits give no thirty-two coins."""
    few = floor(ParityKeys(mixture={"uniform": 1.0}, uniform_bits=12, length=32))
    assert few.nats == pytest.approx(11 / 32 * math.log(2)) and few.accuracy == pytest.approx(1 - 0.5 * 11 / 32)
    assert entropy_mod(1 << 20, 8) == pytest.approx(8) and entropy_mod(3, 8) == pytest.approx(math.log2(3))
    counts = np.bincount(np.arange(1000) % 64)
    assert entropy_mod(1000, 6) == pytest.approx(float(-(counts / 1000 * np.log2(counts / 1000)).sum()))
    whole = floor(ParityKeys(length=32))
    assert whole.nats == pytest.approx(0.5 * 0.6931 + (0.6931 + 31 / 32 * 0.6931 + 0.5623) / 6, abs=1e-3)
