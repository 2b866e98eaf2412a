"""How processes find each other: only the living, of the same attempt."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from treadle.distributed.environment import Launch
from treadle.distributed.meeting import meet, named
from treadle.distributed.notes import WORD, Notes, meeting_folder, taken_folder
from treadle.errors import PeerLost

SHORT, LONG = timedelta(seconds=0.3), timedelta(seconds=20)


class Killed(Exception):
    pass


class Dying:
    """A store whose process is killed before its n-th call."""

    def __init__(self, store: Any, calls: int) -> None:
        self.store, self.calls = store, calls

    def __getattr__(self, name: str) -> Any:
        if name in ("set", "get", "check"):
            self.calls -= 1
            if self.calls < 0:
                raise Killed
        return getattr(self.store, name)


def attempt(boards: list[Any], timeout: timedelta) -> list[Any]:
    """One attempt of as many processes as there are boards; None is one that never starts. What each returned or raised."""
    found: list[Any] = [None] * len(boards)

    def run(rank: int, board: Any) -> None:
        try:
            found[rank] = meet(board, Launch(rank, len(boards), rank, len(boards), "torchrun"), timeout)
        except (PeerLost, Killed) as problem:
            found[rank] = problem

    threads = [threading.Thread(target=run, args=(r, b)) for r, b in enumerate(boards) if b is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


@pytest.fixture(params=["store", "notes"])
def board(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return dist.HashStore() if request.param == "store" else Notes(tmp_path)


def test_every_attempt_has_a_name_of_its_own(board: Any) -> None:
    names = []
    for size in (2, 3, 2):
        one, *others = attempt([board] * size, LONG)
        assert isinstance(one, str) and others == [one] * (size - 1)
        names.append(one)
    assert len(set(names)) == 3


@pytest.mark.parametrize("alone", [0, 1])
def test_nobody_meets_the_dead(board: Any, alone: int) -> None:
    """An attempt was complete and died. Its successor's process waits for a living one, whatever it finds."""
    attempt([board] * 2, LONG)
    boards = [board if rank == alone else None for rank in range(2)]
    lost = attempt(boards, SHORT)[alone]
    assert isinstance(lost, PeerLost) and "has waited" in str(lost)


def test_a_restart_after_a_kill_at_any_moment() -> None:
    """Each process in turn is killed before each of its calls; the next attempt, on the same store, meets at once."""
    for victim in (0, 1):
        for calls in range(12):
            store = dist.HashStore()
            attempt([Dying(store, calls) if rank == victim else store for rank in range(2)], timedelta(seconds=0.05))
            begun = time.monotonic()
            first, second = attempt([store] * 2, LONG)
            assert isinstance(first, str) and first == second, (victim, calls, first, second)
            assert time.monotonic() - begun < 5


def test_one_process_started_again_joins_the_one_that_still_waits() -> None:
    store = dist.HashStore()
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(meet(store, Launch(0, 2), LONG)))
    waiting.start()
    meet_once = Dying(store, 2)  # says hello, looks once, dies
    with pytest.raises(Killed):
        meet(meet_once, Launch(1, 2), LONG)
    time.sleep(0.1)  # the first process has invited the dead one
    assert meet(store, Launch(1, 2), LONG) == (waiting.join(20), found[0])[1]


def test_who_did_not_come_is_named() -> None:
    with pytest.raises(PeerLost, match=r"process 1, 2 did not come"):
        meet(dist.HashStore(), Launch(0, 3), SHORT)


def test_a_launcher_that_saw_one_end_ends_the_waiting(tmp_path: Path) -> None:
    Notes(tmp_path).set(WORD, "process 1 ended with exit code 2")
    begun = time.monotonic()
    with pytest.raises(PeerLost, match="process 1 ended with exit code 2, before all had met"):
        meet(Notes(tmp_path), Launch(0, 2), LONG)
    assert time.monotonic() - begun < 1


def test_two_runs_at_once_meet_in_two_folders() -> None:
    one: dict[str, str] = {}
    other: dict[str, str] = {}
    with meeting_folder(one) as first, meeting_folder(other) as second:
        assert first != second and first.stat().st_mode & 0o77 == 0
        assert taken_folder(one) == first and one == {}  # what a process starts does not inherit it
        left = (first, second)
    assert not any(folder.exists() for folder in left)


def test_notes_keep_the_first_word_and_say_when_they_are_gone(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "n")
    with pytest.raises(OSError):
        notes.check(["a"])
    notes.folder.mkdir()
    assert not notes.check(["a"])
    assert notes.compare_set(WORD, "", "one") == b"one" and notes.compare_set(WORD, "", "two") == b"one"
    notes.set("a/b", "x")
    notes.set("a/b", "y")
    assert notes.get("a/b") == b"y" and notes.check(["a/b", WORD]) and len(list(notes.folder.iterdir())) == 2


def test_a_full_disk_stops_no_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes(tmp_path)
    notes.set("alive", "000000000001")
    monkeypatch.setattr(Notes, "_written", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    notes.set("alive", "000000000002")
    assert notes.get("alive") == b"000000000002"
    with pytest.raises(OSError):
        notes.set("alive", "ended")


def test_keys_of_two_attempts_stand_apart() -> None:
    store = dist.HashStore()
    named(store, "one").set("k", "1")
    assert not named(store, "two").check(["k"]) and named(store, "one").check(["k"])
