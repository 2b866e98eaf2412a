"""Certificates: what is damaged is found and never trusted, two writers are refused, and what is proved has one digest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from treadle.collatz import blocks, certificates
from treadle.collatz.blocks import Totals, Unit, run_unit
from treadle.collatz.certificates import (
    Log,
    Piece,
    UnitRecord,
    block_units,
    header,
    read,
    sealed,
    unit_record,
    unsealed,
)
from treadle.collatz.ledger import Ledger, joined, remaining
from treadle.collatz.merge import merge
from treadle.collatz.verify import verify
from treadle.errors import ConfigError, DataError, RunLocked

START = 1 << 60
Verified = tuple[Path, str]  # a certificate and its digest


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Verified:
    """A finished certificate of a block of 2^20 in units, a small one and a ragged end; and its digest."""
    path = tmp_path_factory.mktemp("certificate") / "a.jsonl"
    result = verify(START, START + (1 << 20) + 300, path, path="python", workers=1)
    assert result.complete
    return path, result.digest


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def copy(verified: Verified, folder: Path) -> Path:
    path = folder / "copy.jsonl"
    path.write_bytes(verified[0].read_bytes())
    return path


def resealed(line: bytes, change: dict[str, object]) -> bytes:
    """A line with other content and a hash that fits: what a forger, or a defect, would write."""
    return sealed({**unsealed(line), **change})


def test_the_lines_are_a_header_units_a_block_and_the_ends(verified: Verified) -> None:
    kinds = [json.loads(line)["kind"] for line in lines_of(verified[0])]
    assert kinds[0] == "header" and kinds.count("block") == 2 and kinds.count("numbers") == 1
    assert kinds.count("unit") == len(block_units(START >> 20, 20))
    assert all(unsealed(line) for line in lines_of(verified[0]))


def test_a_header_tells_the_kind_of_machine_and_nothing_of_its_owner() -> None:
    text = json.dumps(header())
    assert blocks.ALGORITHM in text and "python" in text
    secrets = [os.uname().nodename, os.environ.get("USER", ""), str(Path.home()), str(Path.cwd())]
    assert not [secret for secret in secrets if len(secret) > 2 and secret != "root" and secret in text]


def test_a_record_comes_back_as_it_was_written(verified: Verified) -> None:
    for record in read(verified[0]).records:
        written = unit_record(record) if isinstance(record, UnitRecord) else record.record()
        assert sealed(written) == lines_of(verified[0])[record.place.line - 1]


@pytest.mark.parametrize("change", ["digit", "space", "cut", "garbage", "no_hash", "empty"])
def test_any_change_of_a_line_is_found_by_its_number_and_its_work_is_done_again(
    verified: Verified, tmp_path: Path, change: str
) -> None:
    path, lines = copy(verified, tmp_path), lines_of(verified[0])
    at = next(place for place, line in enumerate(lines) if b'"block"' in line and b'"bits":20' in line)
    line = lines[at]
    lines[at] = {
        "digit": line.replace(b'"leaves":', b'"leaves":1', 1), "space": line.replace(b":", b": ", 1), "cut": line[:50] + b"\n",
        "garbage": b"\xff\x00{]\n", "no_hash": json.dumps({"kind": "block"}).encode() + b"\n", "empty": b"\n",
    }[change]  # fmt: skip
    assert lines[at] != line
    units = [place for place, line in enumerate(lines) if b'"kind":"unit"' in line]
    lines[units[2]] = lines[units[2]].replace(b'"odd_steps":', b'"odd_steps":2', 1)
    path.write_bytes(b"".join(lines))
    assert [place.line for place, _, _ in read(path).unseen] == [units[2] + 1, at + 1]
    assert Ledger([read(path)]).holes(START, START + (1 << 20)) == [(START, START + (1 << 20))]
    said: list[str] = []
    before = path.read_bytes()
    result = verify(START, START + (1 << 20) + 300, path, path="python", workers=1, say=said.append)
    assert result.complete and result.digest == verified[1] and result.damaged == 2
    assert any(f"line {at + 1} is damaged" in text for text in said)
    assert path.read_bytes().startswith(before)  # append-only
    added = [json.loads(line)["kind"] for line in path.read_bytes()[len(before) :].splitlines()]
    assert added == ["damaged", "unit", "block"]
    again: list[str] = []
    assert verify(START, START + (1 << 20) + 300, path, path="python", say=again.append).digest == verified[1]
    assert not again and not read(path).unseen  # known by now


def test_a_torn_last_line_is_kept_aside_and_never_trusted(verified: Verified, tmp_path: Path) -> None:
    whole = verified[0].read_bytes()
    last = len(lines_of(verified[0])[-1])
    for cut in (1, 2, last // 2, last - 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole[:-cut])  # cut == 1: only the newline is missing
        assert read(path).torn == last - cut
        said: list[str] = []
        result = verify(START, START + (1 << 20) + 300, path, path="python", workers=1, say=said.append)
        assert result.complete and result.digest == verified[1] and "cut off" in said[0]
        assert Path(f"{path}.torn").read_bytes() == whole[len(whole) - last : -cut] + b"\n"
        assert not read(path).torn and not read(path).damaged


def test_a_block_whose_line_alone_is_missing_gets_it_without_work(verified: Verified, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    kept = [line for line in lines_of(verified[0]) if not (b'"block"' in line and b'"bits":20' in line)]
    path.write_bytes(b"".join(kept))
    monkeypatch.setattr("treadle.collatz.workers.compute", None)
    assert verify(START, START + (1 << 20) + 300, path, path="python", workers=1).digest == verified[1]
    added = path.read_bytes()[len(b"".join(kept)) :]
    assert json.loads(added)["kind"] == "block" and added.count(b"\n") == 1


def test_a_header_alone_or_cut_off_is_begun_anew(tmp_path: Path) -> None:
    for number, content in enumerate((b"", sealed(header())[:20], sealed(header())[:5], sealed(header()))):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(content)
        assert verify(START, START + 256, path, path="python", workers=1).complete


@pytest.mark.parametrize("content", [b"# Notes\n\nof mine\n", b"notes without an end", b'{"a": 1}\n', b"\n\n"])
def test_a_file_that_is_no_certificate_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a certificate"):
        verify(START, START + 256, path)
    assert path.read_bytes() == content and not Path(f"{path}.torn").exists()


def test_a_certificate_whose_header_is_damaged_is_refused(verified: Verified, tmp_path: Path) -> None:
    path = copy(verified, tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"format":"treadle', b'"format":"breadle', 1))
    with pytest.raises(DataError, match="no sound header"):
        verify(START, START + 256, path)


def test_two_writers_on_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Log(path), pytest.raises(RunLocked, match=r"a\.jsonl"):
        verify(START, START + 256, path)
    assert verify(START, START + 256, path, path="python", workers=1).complete


# ---- lines whose hash fits, but that claim what they must not


def bad_block(verified: Verified, change: dict[str, object]) -> bytes:
    line = next(line for line in lines_of(verified[0]) if b'"block"' in line and b'"bits":20' in line)
    return resealed(line, change)


def test_a_block_proves_nothing_without_all_of_its_units(verified: Verified, tmp_path: Path) -> None:
    line = next(line for line in lines_of(verified[0]) if b'"block"' in line and b'"bits":20' in line)
    parts = unsealed(line)["parts"]
    rest = [{name: value for name, value in part.items() if name != "prefix"} for part in parts[1:]]
    totals = Totals.total(Totals.from_dict(part) for part in rest).as_dict()
    twice = [parts[0], *parts]
    for change, reason in (
        ({"parts": parts[1:], "totals": totals}, "parts are not the"),
        ({"parts": []}, "totals are not"),
        ({"parts": [], "totals": Totals().as_dict()}, "parts are not the"),
        ({"parts": twice}, "twice"),
        ({"totals": totals}, "totals are not"),
        ({"map": "5x+1"}, "map"),
        ({"bits": 7}, "2"),
        ({"bits": "20"}, "lacks"),
        ({"high": -1}, "digits"),
        ({"kind": "proof"}, "kind"),
    ):
        path = tmp_path / "a.jsonl"
        path.write_bytes(sealed(header()) + bad_block(verified, change))
        reading = read(path)
        assert not reading.records and reason in reading.damaged[0][1], (change, reading.damaged)


def test_a_ragged_end_holds_fewer_numbers_than_a_block(verified: Verified, tmp_path: Path) -> None:
    line = next(line for line in lines_of(verified[0]) if b'"numbers"' in line)
    for count in (0, 256, 1 << 60, 1.5, "44"):
        path = tmp_path / "a.jsonl"
        path.write_bytes(sealed(header()) + resealed(line, {"count": count}))
        assert not read(path).records


def test_a_unit_that_its_block_does_not_have_is_refused(tmp_path: Path) -> None:
    unit = Unit(START >> 20, 20, 0, 0)
    path = tmp_path / "a.jsonl"
    path.write_bytes(sealed(header()) + sealed(unit_record(UnitRecord(unit, Totals()))))
    assert not read(path).records


def test_lines_that_disagree_stop_a_verification(verified: Verified, tmp_path: Path) -> None:
    path, lines = copy(verified, tmp_path), lines_of(verified[0])
    small = next(line for line in lines if b'"block"' in line and b'"bits":8' in line)
    parts = unsealed(small)["parts"]
    parts[0]["leaves"] += 1
    totals = unsealed(small)["totals"]
    totals["leaves"] += 1
    path.write_bytes(path.read_bytes() + resealed(small, {"parts": parts, "totals": totals}))
    with pytest.raises(DataError, match="DISAGREE"):
        verify(START, START + (1 << 20) + 300, path)


# ---- several certificates


def test_merging_joins_units_and_blocks_and_names_holes_and_overlaps(tmp_path: Path) -> None:
    high, size = START >> 20, 1 << 20
    units = block_units(high, 20)
    found = {unit.prefix: run_unit(unit, "python") for unit in units}
    names = [tmp_path / f"{letter}.jsonl" for letter in "abcd"]
    for name, mine in zip(names[:2], (units[:9], units[7:]), strict=True):  # a block shared by two, two units by both
        with Log(name) as log:
            for unit in mine:
                log.append(UnitRecord(unit, found[unit.prefix], path="python"))
    verify(START + size, START + 2 * size, names[2], path="python", workers=1)
    verify(START + 3 * size, START + 3 * size + 256, names[3], path="python", workers=1)
    whole = verify(START, START + 2 * size, tmp_path / "whole.jsonl", bits=20, path="python", workers=1)
    merged = merge(names[:3], output=tmp_path / "merged.jsonl")
    assert merged.complete and (merged.start, merged.end) == (START, START + 2 * size)
    assert merged.digest == whole.digest and len(merged.overlaps) == 2 and all(each.agree for each in merged.overlaps)
    again = merge([tmp_path / "merged.jsonl"], START, START + 2 * size)
    assert again.complete and again.digest == whole.digest and not again.overlaps and not again.damaged
    holed = merge(names, START - 5, START + 4 * size)
    assert holed.holes == ((START - 5, START), (START + 2 * size, START + 3 * size), (START + 3 * size + 256, START + 4 * size))
    assert sum("is not proved" in line for line in holed.lines()) == 3
    left = merge([names[0], names[2]], START, START + size, tmp_path / "left.jsonl")
    assert not left.complete and left.holes == ((START, START + size),)  # units of an unfinished block prove nothing
    assert len(read(tmp_path / "left.jsonl").records) == 9 + 1  # but they are kept


def test_blocks_of_other_sizes_overlap_without_a_contradiction(tmp_path: Path) -> None:
    for bits in (14, 15):
        verify(START, START + (1 << 16), tmp_path / f"{bits}.jsonl", bits=bits, path="python", workers=1)
    merged = merge([tmp_path / "14.jsonl", tmp_path / "15.jsonl"])
    assert merged.complete and merged.overlaps and {each.agree for each in merged.overlaps} == {None}


def test_overlaps_that_disagree_name_both_files_and_lines(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for name in (a, b):
        verify(START, START + (1 << 12), name, path="python", workers=1)
    line = lines_of(b)[1]
    parts, totals = unsealed(line)["parts"], unsealed(line)["totals"]
    parts[0]["candidates"] += 1
    totals["candidates"] += 1
    b.write_bytes(lines_of(b)[0] + resealed(line, {"parts": parts, "totals": totals}))
    with pytest.raises(DataError, match=r"a\.jsonl line 2 and .*b\.jsonl line 2 DISAGREE"):
        merge([a, b], output=tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


def test_several_algorithms_are_named_and_their_blocks_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    verify(START, START + 4096, new, path="python", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "ALGORITHM", "tree-0")
        with Log(old) as log:
            unit = Unit((START >> 12) + 1, 12, 0, 0)
            log.append(Piece(unit.start, 4096, 12, 0, {0: run_unit(unit, "python")}, algorithm="tree-0", paths=("python",)))
    merged = merge([old, new])
    assert merged.complete and merged.algorithms == ("tree-0", blocks.ALGORITHM)
    assert any("several algorithms: tree-0" in line for line in merged.lines())
    said: list[str] = []
    assert verify(START, START + 8192, old, path="python", workers=1, say=said.append).complete
    assert any("tree-0" in text for text in said)


def test_merging_never_writes_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    verify(START, START + 256, path, path="python", workers=1)
    with pytest.raises(ConfigError, match="there already"):
        merge([path], output=path)


def test_intervals() -> None:
    assert joined([(5, 7), (1, 3), (3, 4), (6, 9)]) == [(1, 4), (5, 9)]
    assert remaining([(1, 4), (5, 9)], 0, 12) == [(0, 1), (4, 5), (9, 12)]
    assert remaining([(1, 4)], 2, 3) == [] and remaining([], 2, 3) == [(2, 3)] and remaining([(0, 2), (3, 9)], 2, 3) == [(2, 3)]


def test_a_log_is_durable_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(certificates.os, "fsync", calls.append)
    monkeypatch.setattr(certificates, "SYNC_SECONDS", 0.0)
    with Log(tmp_path / "a.jsonl") as log:
        before = len(calls)
        log.append(UnitRecord(block_units(START >> 20, 20)[0], Totals()))
        assert len(calls) == before + 1
        log.sync_if_due()
        assert len(calls) == before + 1  # nothing new
    assert len(calls) == before + 2
