"""The searcher: it finds what is there, says it once and only when it is new, and goes on after any end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import treadle
from treadle.cli_collatz import collatz_app
from treadle.collatz import blocks, compiled, search_log
from treadle.collatz import search as searching
from treadle.collatz.arithmetic import COLLATZ, Map
from treadle.collatz.certificates import sealed
from treadle.collatz.cycle_search import Limits
from treadle.collatz.cycles import Cycle
from treadle.collatz.known_cycles import Discovery, known
from treadle.collatz.ledger import missing
from treadle.collatz.search import BackgroundSearch, search
from treadle.errors import ConfigError, RunLocked

THIRTEEN = Map(3, 13)
PATHS = ["python"] + (["numba"] if compiled.load("cycle_search_numba") is not None else [])


def entries(log: Path, kind: str) -> list[dict[str, Any]]:
    return [entry for entry in map(json.loads, log.read_text().splitlines()) if entry["kind"] == kind]


class StopAfter:
    """A `stopping` that says so from the given question on."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


# ---- finding


@pytest.mark.parametrize("path", PATHS)
def test_with_an_empty_list_everything_is_found(path: str, tmp_path: Path) -> None:
    heard: list[Discovery] = []
    result = search(-400, 401, THIRTEEN, tmp_path / "log.jsonl", path=path, known=frozenset(), on_discovery=heard.append)
    assert {found.cycle.representative for found in heard if found.cycle} == known(THIRTEEN) == result.cycles
    assert result.complete and result.reached == 401 and result.discoveries == heard and len(heard) == len(known(THIRTEEN))
    written = [Discovery.from_dict(entry["discovery"]) for entry in entries(tmp_path / "log.jsonl", "discovery")]
    assert written == heard and Discovery(THIRTEEN, 131, Cycle(THIRTEEN, 131, 24, 15)) in heard


def test_what_is_known_raises_no_alarm() -> None:
    for map in (THIRTEEN, Map(3, -1), Map(5, 1), Map(181, 1)):
        assert search(-400, 401, map).discoveries == []
    only = search(-400, 401, THIRTEEN, known=known(THIRTEEN) - {131}).discoveries
    assert [found.cycle and found.cycle.representative for found in only] == [131]


def test_a_cycle_is_said_once(tmp_path: Path) -> None:
    """Not again by a later piece that runs into it, nor by a later run."""
    log, known_ones = tmp_path / "log.jsonl", known(Map(3, 5)) - {187, 347}
    first = search(100, 150, Map(3, 5), log, known=known_ones)
    again = search(100, 400, Map(3, 5), log, known=known_ones)  # 123 leads to 187
    assert [found.cycle and found.cycle.representative for found in first.discoveries] == [187]
    assert [found.number for found in again.discoveries] == [347] and again.known_discoveries == first.discoveries
    assert len(entries(log, "discovery")) == 2 and search(100, 400, Map(3, 5), log).numbers == 0


@pytest.mark.parametrize("path", [path for path in blocks.PATHS if path == "python" or compiled.load("cycle_search_numba")])
@pytest.mark.parametrize("start, count", [(1, 1), (1, 300), (255, 2), (2**68 - 777, 5000), (2**68 + 255, 2**13), (2**109, 2**12), (2**115, 99)])
def test_under_3x_plus_1_exactly_the_numbers_are_covered(start: int, count: int, path: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    result = search(start, start + count, log=log, path=path)
    assert result.complete and result.discoveries == [] and result.unresolved == 0
    pieces = sorted((int(entry["start"]), int(entry["end"])) for entry in entries(log, "piece"))
    assert pieces[0][0] in (start, 0) and pieces[-1][1] == start + count
    assert all(left[1] == right[0] for left, right in pairwise(pieces))
    assert {"tree-1", "brent-1"} >= {entry["algorithm"] for entry in entries(log, "piece")}


def test_a_false_alarm_of_the_sieve_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it calls unresolved is followed again in integers, with other code, before anybody hears of it."""
    honest = blocks.run_unit

    def alarmed(unit: blocks.Unit, path: str) -> blocks.Totals:
        return replace(honest(unit, path), unresolved=(unit.start + 27,))

    monkeypatch.setattr(blocks, "run_unit", alarmed)
    assert search(2**30, 2**30 + 256, log=tmp_path / "a.jsonl", path="python").discoveries == []
    assert entries(tmp_path / "a.jsonl", "piece")[0]["unresolved"] == []
    monkeypatch.setattr(Limits, "of", staticmethod(lambda map, largest: Limits(steps=30)))
    found = search(2**30, 2**30 + 256, log=tmp_path / "b.jsonl", path="python").discoveries
    assert found == [Discovery(COLLATZ, 2**30 + 27, None, 30, 512)]
    assert entries(tmp_path / "b.jsonl", "piece")[0]["unresolved"] == [str(2**30 + 27)]


# ---- the log


@pytest.mark.parametrize("map", [COLLATZ, Map(3, -1)])
def test_interrupted_anywhere_it_covers_everything(map: Map, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(searching.BLOCK_BITS, "python", 10)
    monkeypatch.setattr(searching, "BLOCK_SECONDS", (0.0, 1e9))
    monkeypatch.setattr(searching.cycle_search, "chunk_size", lambda map, start, path="auto": 1000)
    whole = search(2**20 - 300, 2**20 + 4000, map, tmp_path / "whole.jsonl", path="python")
    log, runs = tmp_path / "log.jsonl", 0
    while True:
        result = search(2**20 - 300, 2**20 + 4000, map, log, path="python", stopping=StopAfter(7))
        runs += 1
        if result.complete:
            break
        if runs % 2:
            with open(log, "ab") as stream:
                stream.write(b'{"algorithm":"brent-1","argm')  # killed while it wrote
    assert runs > 1 and (result.maximum, result.argmax, result.cycles) == (whole.maximum, whole.argmax, whole.cycles)
    plain = [{k: v for k, v in entry.items() if k not in ("seconds", "sha256")} for entry in entries(log, "piece")]
    assert plain == [{k: v for k, v in entry.items() if k not in ("seconds", "sha256")} for entry in entries(tmp_path / "whole.jsonl", "piece")]


def test_a_damaged_line_costs_its_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching.cycle_search, "chunk_size", lambda map, start, path="auto": 100)
    log, said = tmp_path / "log.jsonl", []
    search(0, 1000, Map(3, 5), log)
    lines = log.read_bytes().splitlines(keepends=True)
    lines[4] = lines[4].replace(b'"numbers":100', b'"numbers":101')
    log.write_bytes(b"".join(lines))
    result = search(0, 1000, Map(3, 5), log, say=said.append)
    assert result.complete and result.numbers == 100 and len(said) == 1 and "line 5 is damaged" in said[0]


def test_a_log_of_something_else_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    search(1, 10, Map(3, 5), log)
    with pytest.raises(ConfigError, match=r"log of map 3x\+5, not of map 3x\+7; name another"):
        search(1, 10, Map(3, 7), log)
    (tmp_path / "other.jsonl").write_bytes(sealed({"kind": "piece", "start": "1", "end": "2"}))
    (tmp_path / "text.jsonl").write_text("hello\n")
    for name in ("other.jsonl", "text.jsonl", ""):
        with pytest.raises(ConfigError, match="name"):
            search(1, 10, Map(3, 5), tmp_path / name)
    with search_log.SearchLog(log, {"map": "3x+5"}), pytest.raises(RunLocked, match="another process"):
        search(1, 10, Map(3, 5), log)
    assert search(1, 20, Map(3, 5), log).numbers == 10  # its start is no part of what a log is about


def test_what_is_missing() -> None:
    covered = [(2, 5), (7, 9)]
    assert list(missing(covered, 0, 12)) == [(0, 2), (5, 7), (9, 12)]
    assert list(missing(covered, 3, 8)) == [(5, 7)] and list(missing(covered, 2, 5)) == []
    assert list(missing(covered, 4, None)) == [(5, 7), (9, None)]


# ---- the command, and the process beside a training


def test_the_verbs(capsys: pytest.CaptureFixture[str], in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "lower_priority", lambda nice: None)  # of this very process

    def said(*arguments: str) -> str:
        collatz_app(list(arguments), standalone_mode=False)
        return capsys.readouterr().out

    assert "done: 5,000 numbers from 2^68 on, 5,000 of them in this run" in said("search", "2^68", "--count", "5000")
    assert "done: 5,000 numbers from 2^68 on, 0 of them in this run" in said("search", "2^68", "--count", "5000")
    assert (in_folder / "collatz-search-3x+1-from-2^68.jsonl").exists()
    result = json.loads(said("search", "--map", "3x-1", "--range", "3000", "--json"))
    assert result["cycles"] == ["0", "1", "-1", "5", "17"] and result["complete"] and result["discoveries"] == []
    result = json.loads(said("search", "--map", "3x+1001", "--range=-50:50", "--log", "own.jsonl", "--json"))
    assert [each["cycle"]["representative"] for each in result["discoveries"]] == [
        entry["discovery"]["cycle"]["representative"] for entry in entries(in_folder / "own.jsonl", "discovery")
    ] != []
    cycles = json.loads(said("cycles", "--q", "3", "--c", "5", "--range", "3000", "--json"))["cycles"]
    assert {int(each["representative"]) for each in cycles} == known(Map(3, 5)) and all(each["known"] for each in cycles)
    assert [each["shortcut_steps"] for each in cycles if each["representative"] in ("187", "347")] == [27, 27]
    out = said("cycles", "--q", "5", "--c", "1")
    assert "5x+1: 5 cycles" in out and "13 -> 33 -> 83" in out and "not in the known list" not in out
    assert "114,208,327,604 shortcut steps" in said("bound", "2^68")
    assert json.loads(said("bound", "--json"))["odd_steps"] == 72_057_431_991
    for arguments in (["search", "2^68", "--range", "5"], ["search", "2^68", "--count", "0"], ["search", "--map", "4x+1"],
                      ["search", "10^4000"], ["search", "--range", "5:5"], ["search", "--range=-5"], ["cycles", "--q", "4"],
                      ["cycles", "--q", "3", "--map", "3x+1"], ["cycles", "--length", "99"], ["bound", "2"]):  # fmt: skip
        with pytest.raises(ConfigError):
            collatz_app(arguments, standalone_mode=False)


def wait_for(true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_stopped_by_a_signal_it_goes_on(in_folder: Path) -> None:
    command = [sys.executable, "-m", "treadle", "collatz", "search", "2^90", "--map", "3x-1", "--log", "log.jsonl", "--nice", "3"]
    log, reached = in_folder / "log.jsonl", []
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9), (signal.SIGINT, 75)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        had = len(entries(log, "piece")) if log.exists() else 0
        wait_for(lambda had=had: log.exists() and log.read_bytes().count(b'"piece"') > had)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 3
        process.send_signal(number)
        began = time.monotonic()
        out = process.communicate(timeout=60)[0].decode()
        assert process.returncode == code, out
        assert code != 75 or (time.monotonic() - began < 10 and "the same command goes on" in out)
        covered = search_log.read(log).covered()
        assert len(covered) == 1 and covered[0][0] == 2**90
        reached.append(covered[0][1])
    assert reached == sorted(set(reached))


def test_beside_a_training(in_folder: Path) -> None:
    log = in_folder / "run" / "search.jsonl"
    beside = BackgroundSearch(150, log, Map(3, 1001))
    beside.start()
    assert beside._process is not None and beside.problem() is None
    pid, found = beside._process.pid, []
    wait_for(lambda: found.extend(beside.poll()) or (beside.reached > 150 and found))
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    assert 181 in [each.cycle.representative for each in found if each.cycle] and beside.poll() == [] == beside.poll()
    beside.stop()
    beside.stop()
    beside.poll()
    assert beside.problem() is None and beside._process.returncode == 75 and beside.reached > 150
    later = BackgroundSearch(150, log, Map(3, 1001))
    later.start()
    assert later.reached == beside.reached
    wait_for(lambda: later.poll() == [] and later.reached > beside.reached)  # nothing is said a second time
    later.stop()


def test_an_end_of_its_own_is_a_problem(in_folder: Path) -> None:
    beside = BackgroundSearch(1, in_folder / "log.jsonl", Map(3, 5), count=1000)
    beside.start()
    assert beside._process is not None
    assert beside._process.wait(60) == 0 and beside.problem() is None
    beside.poll()
    assert beside.reached == 1001
    wrong = BackgroundSearch(1, in_folder / "log.jsonl", Map(3, 7))
    wrong.start()
    assert wrong._process is not None
    assert wrong._process.wait(60) == 2 and "log of map 3x+5" in str(wrong.problem())
    beside.count = None
    beside.start()
    beside._process.kill()
    beside._process.wait()
    assert "code -9" in str(beside.problem())


def test_it_ends_with_the_process_that_started_it(in_folder: Path) -> None:
    program = ("import sys, time; from treadle.collatz.search import BackgroundSearch\n"
               "search = BackgroundSearch(2**90, 'log.jsonl'); search.start(); print(search._process.pid, flush=True); time.sleep(99)")  # fmt: skip
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait_for(lambda: (in_folder / "log.jsonl").exists())
    parent.kill()
    parent.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_for(gone, 30)
    out = treadle("collatz", "search", "1", "--count", "9", "--end-with", "1", cwd=in_folder)
    assert out.returncode == 75
