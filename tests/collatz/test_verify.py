"""Proving an interval: nothing outside of it is claimed, and however it is shared or interrupted, the same is proved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.collatz import blocks, sieve, workers
from treadle.collatz.blocks import Totals, run_unit
from treadle.collatz.certificates import Numbers, block_units, read
from treadle.collatz.ledger import Ledger
from treadle.collatz.verify import default_bits, default_output, interval, split, verify
from treadle.collatz.workers import Done, Work, WorkerFailed, completed, worker_count
from treadle.errors import ConfigError

START = (1 << 68) - 700
END = (1 << 68) + (1 << 19) + 77
BITS = 14


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of [START, END) in one go by one worker."""
    result = verify(START, END, tmp_path_factory.mktemp("whole") / "a.jsonl", bits=BITS, path="python", workers=1)
    assert result.complete and result.proved == END - START
    return result.digest


# ---- what is split, and what is claimed


@given(start=st.integers(1, 1 << 70), size=st.integers(1, 1 << 45), bits=st.integers(8, 40))
@settings(max_examples=300, deadline=None)
def test_an_interval_is_split_without_holes_and_without_anything_outside(start: int, size: int, bits: int) -> None:
    size = min(size, 2000 << bits)
    at = start
    for piece in split(start, start + size, bits):
        if isinstance(piece, Numbers):
            first, length = piece.first, piece.count
            assert length < 256
        else:
            high, t = piece
            assert 8 <= t <= bits
            first, length = high << t, 1 << t
        assert first == at
        at += length
    assert at == start + size


def test_of_an_interval_every_number_is_in_one_unit() -> None:
    start, end = 12345, 12345 + 3000
    seen: list[int] = []
    for piece in split(start, end, 10):
        if isinstance(piece, Numbers):
            seen += range(piece.first, piece.first + piece.count)
        else:
            for unit in block_units(*piece):
                seen += unit.first(0, 0)
    assert sorted(seen) == list(range(start, end))


def test_ragged_ends_are_followed_one_by_one() -> None:
    done = workers.compute(Numbers(97, 8), "python")  # 97 to 104; of 3 mod 4: 99 and 103
    assert done.totals == blocks.every([99, 103])
    assert done.totals.maximum == max(blocks.direct(99).maximum, blocks.direct(103).maximum)


def test_from_one_on_the_conclusion_needs_nothing_else(tmp_path: Path) -> None:
    result = verify(1, 5000, tmp_path / "a.jsonl", path="python", workers=1)
    assert result.complete and result.proved == 4999 and result.blocks == 4  # 4096, 512, 256 numbers and 136
    for start, end in ((1, 2), (1, 256), (2, 300), (3, 7)):
        assert verify(start, end, tmp_path / f"{start}-{end}.jsonl", path="python", workers=1).proved == end - start


def test_a_small_interval_is_checked_against_every_trajectory(tmp_path: Path) -> None:
    start, end = (1 << 40) - 300, (1 << 40) + 5000
    result = verify(start, end, tmp_path / "a.jsonl", path="python", workers=1, bits=9)
    following = [blocks.direct(n) for n in range(start, end)]
    assert result.complete and not any(totals.unresolved for totals in following)
    assert result.totals.maximum <= max(totals.maximum for totals in following)
    assert blocks.direct(result.totals.argmax).maximum == result.totals.maximum


def test_intervals_that_make_no_sense_are_refused() -> None:
    for start, end, size in (
        (0, 5, None), (-4, None, 5), (5, 5, None), (5, 4, None), (5, None, 0), (5, None, None), (5, 9, 4),
        (1, (1 << 1000) + 1, None), (1 << 120, None, 1 << 36),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            interval(start, end, size)
    assert interval(5, None, 4) == interval(5, 9, None) == (5, 9)
    assert interval(1 << 300, None, 1 << 24)[0] == 1 << 300
    for asked in ("0", "-1", "two", "1.5", "99999"):
        with pytest.raises(ConfigError, match="--workers"):
            worker_count(asked)


def test_sizes_of_blocks_and_names_of_files() -> None:
    assert [default_bits(1 << n) for n in (10, 36, 40, 41, 44, 60)] == [36, 36, 36, 37, 40, 40]
    assert str(default_output(1 << 68, (1 << 68) + (1 << 36))) == "collatz-2^68-to-2^68+2^36.jsonl"
    assert len(default_output(1 << 900, (1 << 900) + 3**200).name) < 200


# ---- the same, however it is done


@pytest.mark.parametrize("number", [1, 2, 3])
def test_workers_change_nothing(undisturbed: str, tmp_path: Path, number: int) -> None:
    path = tmp_path / "a.jsonl"
    assert verify(START, END, path, bits=BITS, path="python", workers=number).digest == undisturbed
    assert not Ledger([read(path)]).overlaps


@pytest.mark.parametrize("path", [path for path in blocks.PATHS if path != "python"])
def test_paths_change_nothing(undisturbed: str, tmp_path: Path, path: str) -> None:
    pytest.importorskip(path)
    assert verify(START, END, tmp_path / "a.jsonl", bits=BITS, path=path, workers=2).digest == undisturbed


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_threads_and_processes_change_nothing(kind: Any, monkeypatch: pytest.MonkeyPatch, undisturbed: str, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "best_kind", lambda path: kind)
    assert verify(START, END, tmp_path / "a.jsonl", bits=BITS, path="python", workers=2).digest == undisturbed


def after(looks: int) -> Callable[[], bool]:
    """Asks to stop at the look after so many."""
    places = count(1)
    return lambda: next(places) > looks


def test_stopping_keeps_what_is_finished_and_the_next_start_does_the_rest(
    undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "best_kind", lambda path: "threads")
    path, starts, proved = tmp_path / "a.jsonl", 0, -1
    while True:
        starts += 1
        result = verify(START, END, path, bits=BITS, path="python", workers=1, stopping=after(7))
        assert result.proved > proved
        proved = result.proved
        if result.complete:
            break
        assert result.holes
    assert starts > 3 and result.digest == undisturbed
    assert not Ledger([read(path)]).overlaps  # nothing was done twice


def test_a_longer_interval_goes_on_in_the_same_file(undisturbed: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    middle = (1 << 68) + (1 << 17)
    verify(START, middle, path, bits=BITS, path="python", workers=1)
    before = path.stat().st_size
    result = verify(START, END, path, bits=BITS, path="python", workers=1)
    assert result.complete and result.digest == undisturbed and result.progress.before == middle - START
    assert path.stat().st_size > before


def test_units_of_an_unfinished_block_are_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "best_kind", lambda path: "threads")
    path = tmp_path / "a.jsonl"
    first = verify(1 << 68, (1 << 68) + (1 << 20), path, path="python", workers=1, stopping=after(5))
    units = [json.loads(line)["prefix"] for line in path.read_bytes().splitlines() if b'"unit"' in line]
    assert not first.complete and 0 < len(units) < len(block_units(1 << 48, 20))
    assert 0 < first.progress.done < first.progress.total  # their share of the block
    did: list[Work] = []
    real = workers.compute

    def compute(work: Work, path: str, sieve: str = "tree") -> Done:
        did.append(work)
        return real(work, path, sieve)

    monkeypatch.setattr(workers, "compute", compute)
    assert verify(1 << 68, (1 << 68) + (1 << 20), path, path="python", workers=1).complete
    again = {work.prefix for work in did if not isinstance(work, Numbers)}
    assert not again & set(units) and len(again) + len(units) == len(block_units(1 << 48, 20))


# ---- what ends badly


def test_a_number_that_does_not_come_down_is_shouted_recorded_and_never_counted_as_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "best_kind", lambda path: "threads")
    start, path, said = 1 << 68, tmp_path / "a.jsonl", []
    slow = max(range(start, start + 4096), key=lambda n: blocks.direct(n).odd_steps)
    following = blocks.follow

    def follow(n: int, depth: int) -> Totals:
        return Totals(0, 1, 0, 0, n, n, (), (n,)) if n == slow else following(n, depth)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "follow", follow)
        result = verify(start, start + 8192, path, bits=12, path="python", workers=1, say=said.append)
    assert result.unresolved == (slow,) and not result.complete and result.proved == 4096
    assert result.holes == ((start, start + 4096),) and str(slow) in said[0] and "counterexample" in said[0]
    again = verify(start, start + 8192, path, bits=12, path="python", workers=1)
    assert again.unresolved == (slow,) and again.proved == 4096  # known, and not done again
    assert len(path.read_bytes().splitlines()) == 3


def test_an_error_in_a_worker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    work = list(block_units(1 << 48, 20))[:3]

    def broken(work: Work, path: str, sieve: str = "tree") -> Done:
        raise MemoryError("no more")

    monkeypatch.setattr(workers, "compute", broken)
    with pytest.raises(MemoryError):
        list(completed(iter(work), "python", 2, lambda: False, kind="threads"))
    monkeypatch.undo()
    with pytest.raises(WorkerFailed, match="no sieve 'round'"):  # in a process: its sentence comes back
        list(completed(iter(work), "python", 2, lambda: False, sieve="round", kind="processes"))


def children(pid: int) -> list[int]:
    """Processes that `pid` has started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(folder.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(happened: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def test_a_unit_whose_process_is_killed_is_done_again_once() -> None:
    units = block_units(1 << 48, 20)
    results: list[Done] = []
    killed = 0
    found = completed(iter(units), "python", 2, lambda: False, kind="processes")
    for done in found:
        if done is not None:
            results.append(done)
            if killed < 2:
                victims = [pid for pid in children(os.getpid()) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
                os.kill(victims[killed % len(victims)], signal.SIGKILL)
                killed += 1
    assert killed == 2
    assert sorted(done.work.prefix for done in results if not isinstance(done.work, Numbers)) == sorted(unit.prefix for unit in units)


COMMAND = ["collatz", "verify", str(START), str(START + (1 << 22)), "--bits", "18", "--workers", "2"]


def started(output: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "treadle", *COMMAND, "--output", str(output), *more],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.fixture
def process() -> Iterator[list[subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []
    yield running
    for each in running:
        if each.poll() is None:
            each.kill()
        each.communicate()


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the interval of COMMAND, undisturbed."""
    path = tmp_path_factory.mktemp("longer") / "a.jsonl"
    return verify(START, START + (1 << 22), path, bits=18, path="python", workers=1).digest


def test_kill_9_in_the_middle_again_and_again_and_the_same_certificate(
    longer: str, tmp_path: Path, process: list[subprocess.Popen[bytes]]
) -> None:
    path, size = tmp_path / "a.jsonl", 0
    for _ in range(4):
        run = started(path, "--path", "python")
        process.append(run)
        assert until(lambda: path.is_file() and path.stat().st_size > size + 1500)  # noqa: B023
        workers_of = children(run.pid)
        assert run.poll() is None, "finished before it was killed: the interval is too short for this test"
        run.kill()
        run.wait()
        assert until(lambda: not any(alive(pid) for pid in workers_of)), "workers outlived their parent"  # noqa: B023
        size = path.stat().st_size
    assert not verify_nothing(path).complete
    last = started(path, "--path", "python", "--json")
    process.append(last)
    out, error = last.communicate(timeout=100)
    result = json.loads(out)
    assert last.returncode == 0 and not error, error
    assert result["complete"] and result["digest"] == longer and int(result["proved_before"]) > 0
    assert not Ledger([read(path)]).overlaps


def verify_nothing(path: Path) -> Any:
    """The state of a certificate, as a start that is stopped at once sees it."""
    return verify(START, START + (1 << 22), path, bits=18, path="python", workers=1, stopping=lambda: True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_75_and_the_same_command_continues(
    longer: str, tmp_path: Path, process: list[subprocess.Popen[bytes]], number: signal.Signals
) -> None:
    path = tmp_path / "a.jsonl"
    run = started(path, "--path", "python")
    process.append(run)
    assert until(lambda: path.is_file() and path.stat().st_size > 1500)
    run.send_signal(number)
    out, error = run.communicate(timeout=30)
    assert run.returncode == 75 and not error, error
    assert b"the same command continues" in out and number.name.encode() in out
    assert not read(path).torn
    last = started(path, "--path", "python", "--json")
    process.append(last)
    result = json.loads(last.communicate(timeout=100)[0])
    assert last.returncode == 0 and result["digest"] == longer and int(result["proved_before"]) > 0


def at_work(output: Path, running: list[subprocess.Popen[bytes]]) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A verification whose units take hours, and its two workers, busy."""
    command = [sys.executable, "-m", "treadle", "collatz", "verify", "2^68", "--count", "2^40", "--path", "python", "--workers", "2"]
    run = subprocess.Popen([*command, "--output", str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.append(run)

    def busy() -> list[int]:
        found = [pid for pid in children(run.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        ticks = [int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) for pid in found]
        return [pid for pid, spent in zip(found, ticks, strict=True) if spent > 40]  # .4 s: it has begun to compute

    assert until(lambda: len(busy()) == 2)
    return run, busy()


def test_workers_inside_a_long_unit_end_with_their_parent(tmp_path: Path, process: list[subprocess.Popen[bytes]]) -> None:
    run, theirs = at_work(tmp_path / "a.jsonl", process)
    run.kill()
    run.wait()
    ended = until(lambda: not any(alive(pid) for pid in theirs), 5)
    for pid in filter(alive, theirs):
        os.kill(pid, signal.SIGKILL)  # they hold the pipes that the next lines wait for
    assert ended


def test_a_second_signal_does_not_wait_for_long_units(tmp_path: Path, process: list[subprocess.Popen[bytes]]) -> None:
    run, theirs = at_work(tmp_path / "a.jsonl", process)
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=30)
    assert run.returncode == 75 and not error and time.monotonic() - began < workers.GRACE
    assert until(lambda: not any(alive(pid) for pid in theirs), 5)


def test_the_maximum_does_not_depend_on_who_finds_it() -> None:
    units = list(block_units(1 << 48, 20))
    whole = run_unit(blocks.Unit(1 << 48, 20, 0, 0), "python")
    assert Totals.total(run_unit(unit, "python") for unit in units) == whole
    assert sieve.FLOOR < units[0].start


@pytest.mark.slow
def test_kill_9_of_the_compiled_path_near_2_68(tmp_path: Path, process: list[subprocess.Popen[bytes]]) -> None:
    """2^39 numbers in blocks of 2^36: about 8 seconds of one core, killed three times, then finished with one worker."""
    pytest.importorskip("numba")
    end = (1 << 68) + (1 << 39)
    whole = verify(1 << 68, end, tmp_path / "whole.jsonl", bits=36, path="numba", workers=2)
    path, size = tmp_path / "a.jsonl", 0
    command = [sys.executable, "-m", "treadle", "collatz", "verify", "2^68", "--count", "2^39", "--bits", "36", "--output", str(path)]
    for _ in range(3):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        process.append(run)
        assert until(lambda: path.is_file() and path.stat().st_size > size + 4000)  # noqa: B023
        assert run.poll() is None, "finished before it was killed"
        run.kill()
        run.wait()
        size = path.stat().st_size
    with open(path, "r+b") as stream:  # and as if the last line had been cut by a power failure
        stream.truncate(size - 100)
    result = verify(1 << 68, end, path, bits=36, path="numba", workers=1)
    assert result.complete and result.progress.before > 0 and result.digest == whole.digest
    assert not Ledger([read(path)]).overlaps
