"""Records: as published, as a search without a sieve finds them, the same on every path and after any interruption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from treadle.cli_collatz import collatz_app
from treadle.collatz import compiled, records_log
from treadle.collatz import records as sieved
from treadle.collatz.arithmetic import delay, maximum
from treadle.collatz.records import BASE, KINDS, PATHS, Record, RecordSearch, growth, records
from treadle.errors import ConfigError

COMPILED = compiled.load("records_numba") is not None
HERE = [path for path in PATHS if path != "numba" or COMPILED]
# OEIS A006877 and A006884 up to the limits that are searched here.
A006877 = [1, 2, 3, 6, 7, 9, 18, 25, 27, 54, 73, 97, 129, 171, 231, 313, 327, 649, 703, 871, 1161, 2223, 2463, 2919, 3711, 6171,
           10971, 13255, 17647, 23529, 26623, 34239, 35655, 52527, 77031, 106239, 142587, 156159, 216367, 230631, 410011, 511935,
           626331, 837799, 1117065, 1501353, 1723519, 2298025, 3064033, 3542887, 3732423, 5649499, 6649279, 8400511, 11200681,
           14934241, 15733191, 31466382, 36791535, 63728127]  # fmt: skip
A006884 = [1, 2, 3, 7, 15, 27, 255, 447, 639, 703, 1819, 4255, 4591, 9663, 20895, 26623, 31911, 60975, 77671, 113383, 138367,
           159487, 270271, 665215, 704511, 1042431, 1212415, 1441407, 1875711, 1988859, 2643183, 2684647, 3041127, 3873535, 4637979,
           5656191, 6416623, 6631675, 19638399, 38595583, 80049391, 120080895, 210964383, 319804831, 1410123943]  # fmt: skip
VALUES = {27: 9232, 703: 250504, 159487: 17202377752, 1410123943: 7125885122794452160}  # A006885


def without_a_sieve(below: int, kind: str) -> list[Record]:
    """From the values of all numbers."""
    values = [0] * below
    found: list[Record] = []
    for n in range(1, below):
        x, steps, most = n, 0, n
        while x >= n > 1:
            x, steps = (3 * x + 1, steps + 1) if x & 1 else (x >> 1, steps + 1)
            most = max(most, x)
        values[n] = (steps + values[x] if kind == "delay" else max(most, values[x])) if n > 1 else int(kind == "path")
        if not found or values[n] > found[-1].value:
            found.append(Record(n, values[n]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_without_a_sieve_finds_the_same(kind: str) -> None:
    below = 3 * BASE + 777
    expected = without_a_sieve(below, kind)
    assert expected[-1].value == KINDS[kind](expected[-1].number)
    for path in HERE:
        assert records(below, kind, path) == expected, path


@pytest.mark.skipif(not COMPILED, reason="numba is not installed; the other paths need minutes")
def test_published_records() -> None:
    found = records(10**8)
    assert [each.number for each in found] == A006877 and all(delay(each.number) == each.value for each in found)
    found = records(2**31, "path")
    assert [each.number for each in found] == A006884 and all(maximum(each.number) == each.value for each in found)
    assert {each.number: each.value for each in found if each.number in VALUES} == VALUES


def test_the_paths_agree_further_out() -> None:
    """From the records below 2^40 by hand: pieces far from 0, where the numbers leave 64 bits on their way."""
    begin = {"delay": [Record(63728127, 949)], "path": [Record(319804831, 1414236446719942480)]}
    for kind, end in (("delay", 10**10), ("path", 1410123943)):
        found = {}
        for path in HERE:
            search = RecordSearch(kind, path)
            search.resume((end >> 16) - 1 << 16, begin[kind])
            found[path] = search.advance((end >> 16) + 2 << 16)
        assert all(each == found["python"] for each in found.values())
        assert kind == "delay" or [each.number for each in found["python"]] == [1410123943]
    for path in HERE:
        search = RecordSearch("path", path)
        search.resume(12327829503 >> 16 << 16, [Record(8528817511, 18144594937356598024)])
        assert search.advance(12327829504) == [Record(12327829503, 20722398914405051728)], path  # above 2^64


def test_the_largest_known_maximum_below_2_to_61() -> None:
    assert maximum(1980976057694848447) == 64024667322193133530165877294264738020


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_add_up(kind: str) -> None:
    whole, pieces = records(5 * BASE, kind, "numpy"), RecordSearch(kind, "numpy")
    for end in (1, 2, 28, 1000, BASE - 1, BASE + 1, 2 * BASE + 12345, 2 * BASE + 12346, 5 * BASE):
        pieces.advance(end)
    assert pieces.records == whole


@pytest.mark.parametrize("descending", [False, True])
def test_what_the_sieve_leaves_out_has_a_witness(descending: bool) -> None:
    """A smaller number that meets it after as many steps or passes through it, or itself below its start."""
    sieve = sieved._sieve(descending)
    for a in (2, 9, 40):
        n = np.arange(a << 16, (a + 1) << 16)
        x, f, down = n.copy(), np.zeros_like(n), np.zeros(len(n), dtype=bool)
        for _ in range(16):
            x, f = np.where(x % 2 == 1, (3 * x + 1) // 2, x // 2), f + x % 2
            down |= x < n
        first: dict[tuple[int, int], int] = {}
        for number, image in zip(n.tolist(), zip(x.tolist(), f.tolist())):
            first.setdefault(image, number)
        residues, images, odd_steps = sieve.block(a)
        kept = set(((a << 16) + residues.astype(np.int64)).tolist())
        for number, image, falls in zip(n.tolist(), zip(x.tolist(), f.tolist()), down.tolist()):
            witness = number % 3 == 2 or number % 9 == 4 or first[image] < number or (descending and falls)
            assert number in kept or number % 2 == 0 or witness
        place = residues.astype(np.int64)
        assert (x[place] == images + 3 ** odd_steps.astype(np.int64) * a).all() and (f[place] == odd_steps).all()


def test_what_some_steps_can_reach() -> None:
    for steps in (1, 12, 16):
        for x in [*range(1, 3000), (7 << steps) - 1, (1 << 40) - 1]:
            most, y = 0, x
            for _ in range(steps):
                most = max(most, 3 * y + 1 if y & 1 else y)
                y = (3 * y + 1) // 2 if y & 1 else y // 2
            assert most <= growth(steps) * (x + 1)
        assert most > (growth(steps) - 2) * (x + 1)  # all odd: as far as it can be


@pytest.mark.parametrize("kind, n", [
    ("delay", (1 << 45) - 1), ("delay", (5 << 43) - 1), ("delay", (589 << 35) - 1), ("delay", 75128138247),
    ("path", (1 << 45) - 1), ("path", (5 << 43) - 1), ("path", 12327829503),
])  # fmt: skip
def test_one_record_among_large_numbers(kind: str, n: int) -> None:
    """The first ones climb beyond 64 bits by odd steps alone, where one jump too many would wrap."""
    value = KINDS[kind](n)
    for path in HERE:
        search = RecordSearch(kind, path)
        search.records = [Record(1, value - 1)]  # so nothing is cut off
        search.reached = n
        assert search._candidates(n + 1) == [(n, value)], path


def test_a_long_search_goes_on_from_its_log(tmp_path: Path) -> None:
    log, seen, said = tmp_path / "records.jsonl", [], []
    for _ in range(20):
        search = records_log.search(6 * BASE, "path", "python", log, lambda: True, seen.append, said.append)
        if search.reached == 6 * BASE:
            break
        with open(log, "ab") as stream:
            stream.write(b'{"kind":"piece","start"')  # killed while it wrote
    assert search.records == records(6 * BASE, "path", "numpy") and 3 < len(seen) < 12
    assert [at.before for at in seen] == [1, *(at.reached for at in seen[:-1])] and all("damaged" in text for text in said)
    with pytest.raises(ConfigError, match="log of records path"):
        records_log.search(BASE, "delay", "python", log)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"start"', b'"stark"'), *lines[3:]]))
    assert records_log.search(6 * BASE, "path", "numpy", log).records == search.records


def test_a_wrong_record_in_a_log_is_refused() -> None:
    for wrong in ([Record(27, 112)], [Record(27, 111), Record(25, 23)]):
        with pytest.raises(ConfigError, match="is no delay record"):
            RecordSearch().resume(100, wrong)


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    collatz_app(["records", "--below", "10^4", "--json", "--path", "python"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert [int(each["number"]) for each in said["records"]] == [n for n in A006877 if n < 10**4] and said["below"] == "10000"
    collatz_app(["records", "--below", "1000", "--kind", "path"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "250,504" in out and "10 path records below 1,000" in out
    for arguments in (["--below", "2^60"], ["--below", "0"], ["--kind", "height"], ["--path", "fast"]):
        with pytest.raises(ConfigError):
            collatz_app(["records", *arguments], standalone_mode=False)
