"""The audit: a sound sieve passes, every way of making it unsound is found, and so are totals that are not the block's."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from treadle.collatz import blocks
from treadle.collatz.audit import Witness, audit, excluded_without, witness
from treadle.collatz.blocks import Unit, run_unit, units
from treadle.collatz.sieve import Rules
from treadle.errors import ConfigError


@pytest.mark.parametrize("seed", range(8))
def test_every_excluded_number_has_a_witness(seed: int) -> None:
    chance = random.Random(seed)
    bits, high = chance.choice([10, 12, 14, 20, 36, 40]), chance.getrandbits(chance.randint(12, 60)) | 1 << 11
    report = audit(high, bits, samples=4, seed=seed)
    assert report.passed and not report.unjustified and not report.disagreements
    assert report.numbers == 4 * min(1024, 1 << bits) and sum(report.witnesses.values()) > report.numbers // 2
    assert {"descent", "preimage", "merging"} >= set(report.witnesses)


WRONG = {
    "the offset dropped from the index": Rules("broken", with_high=False),
    "the wrong word of preimages": Rules("turned", turn=1),
    "descent by a tenth of a doubling too early": Rules("slack", slack=31),
    "heights from one odd step less": Rules("steps", slack=485),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("path", blocks.installed())
def test_a_wrong_sieve_is_found(wrong: str, path: str) -> None:
    high = random.Random(wrong).getrandbits(50) | 1
    report = audit(high, 20, samples=6, path=path, sieve=WRONG[wrong])
    assert report.unjustified and not report.passed
    assert any("without a witness" in line for line in report.lines())
    assert all(n >> 20 == high for n in report.unjustified)


def test_a_wrong_sieve_gives_no_other_maximum_and_still_fails() -> None:
    """What makes audits necessary: nothing in the result of a wrong sieve is impossible."""
    chosen = [unit for unit in units(123456789, 14) if unit.prefix % 32 == 27]
    found = [run_unit(unit, sieve="broken") for unit in chosen]
    assert all(not each.unresolved for each in found)
    assert not audit(123456789, 14, samples=6, sieve="broken").passed


def test_recorded_totals_are_computed_again() -> None:
    recorded = {unit.prefix: run_unit(unit) for unit in units(1 << 40, 16)}
    assert audit(1 << 40, 16, recorded, samples=16).passed
    some = max(recorded, key=lambda prefix: recorded[prefix].candidates)
    wrong = {**recorded, some: replace(recorded[some], odd_steps=recorded[some].odd_steps + 1)}
    report = audit(1 << 40, 16, wrong, samples=16)
    assert not report.passed and report.recomputed == 16 and "odd_steps" in report.disagreements[0]
    assert f"prefix={some}," in report.disagreements[0]
    missing = {prefix: totals for prefix, totals in recorded.items() if prefix != some}
    assert not audit(1 << 40, 16, missing, samples=2).passed
    assert not audit(1 << 40, 16, {**recorded, 0: recorded[some]}, samples=2).passed


def test_totals_of_a_broken_sieve_are_found() -> None:
    high = (1 << 40) + 12345
    recorded = {unit.prefix: run_unit(unit, sieve="broken") for unit in units(high, 16)}
    assert not audit(high, 16, recorded, samples=16).passed


def test_witnesses() -> None:
    high = 1 << 60
    assert witness(4 * high + 1, 30) == Witness("descent", 3 * high + 1, 3 * high + 1)
    # 9 a + 4 with a = 3 mod 4 does not come down at once, and 8 a + 3 leads to it
    n = next(n for n in range(9 * high + 4, 9 * high + 40_000, 9) if n % 1024 == 1023)
    found = witness(n, 4)
    assert found is not None and found.kind == "preimage" and found.meets == n and found.holds(n)
    assert witness((1 << 70) - 1, 40) is None  # 40 odd steps, a multiple of three
    assert not Witness("descent", n - 1, n - 1).holds(n, 20)  # n does not come to it
    assert not Witness("preimage", n, n).holds(n)  # not smaller
    assert not Witness("preimage", n - 2, n).holds(n, 20)  # does not lead to it


def test_a_sieve_that_excludes_all_is_caught_number_by_number() -> None:
    unit = Unit(987654321, 12, 31, 5)
    followed = blocks.candidates(unit)
    kinds, without = excluded_without(unit, sieve=Rules("all", slack=1 << 20))
    assert set(without) <= set(followed) and len(without) > len(followed) // 2
    assert sum(kinds.values()) + len(without) == unit.size


def test_an_audit_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError):
        audit(1 << 40, 16, samples=0)


def test_a_witness_is_followed_before_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = Unit(987654321, 12, 27, 5)
    assert not excluded_without(unit)[1]
    monkeypatch.setattr("treadle.collatz.audit.witness", lambda n, steps: Witness("merging", n - 2, n - 2))
    kinds, without = excluded_without(unit)
    assert not kinds and len(without) == unit.size - len(blocks.candidates(unit))
