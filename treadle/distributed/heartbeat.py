"""Noticing within a minute that another process is gone, also where a GPU would wait for it for ever, and ending together.

Every process writes a counter every few seconds, into the store in which they met (or the launch's folder), and reads the
others'. gloo notices a lost process by itself, at once; NCCL waits out its timeout of minutes.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from treadle.distributed.notes import GONE, WORD

BEAT_SECONDS, SILENCE_SECONDS, WORD_SECONDS = 3.0, 40.0, 2.0
FAILED_SECONDS = 20.0  # from the word of a failed process to the end of one that cannot get on without it
CLOSING_SECONDS = 10.0  # how long a process that is done waits for the others to be done
LOST_CODE = 75
ENDED = "ended"


class Heartbeat:
    """One daemon thread; ends this process with code 75 when another one falls silent, or has failed and is waited for."""

    def __init__(self, board: Any, rank: int, size: int, silence: float = SILENCE_SECONDS) -> None:
        self.board, self.rank, self.size, self.silence = board, rank, size, silence
        self.others = [other for other in range(size) if other != rank]
        self.failed = False  # this process ends badly and has said so
        self.heard = ""  # why another one does
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="treadle-heartbeat", daemon=True)

    @staticmethod
    def start(board: Any, rank: int, size: int) -> Heartbeat:
        """Over the board on which the processes have met."""
        beat = Heartbeat(board, rank, size)
        beat.thread.start()
        return beat

    def leave_word(self, text: str) -> None:
        """Says why this process ends; the first word stays."""
        self.failed = True
        try:
            self.board.compare_set(WORD, "", f"process {self.rank} ended: {text}")
        except GONE:
            pass  # the store went with its process

    def word(self) -> str:
        """Why another process ended, if one has said so; empty where nobody has."""
        if not self.heard and self.board.check([WORD]):
            self.heard = self.board.get(WORD).decode(errors="replace")
        return self.heard

    def reason(self) -> str:
        """The same, waiting a moment: a connection may break before the word arrives."""
        until = time.monotonic() + WORD_SECONDS
        try:
            while time.monotonic() < until:
                if self.word():
                    break
                time.sleep(0.1)
        except GONE:
            pass
        return self.heard

    # ---- ending ----

    def close(self) -> None:
        """This process ends; where it has left no word, the others need not miss it."""
        self.closed.set()
        self.thread.join(timeout=5)  # a store that goes while a thread asks it aborts the process
        try:
            if not self.failed:
                self.board.set(self._key(self.rank), ENDED)
        except GONE:
            pass

    def wait_for_others(self, orderly: bool, holds_store: bool) -> None:
        """The closing barrier, after close(): until the others are done too, so that nobody finds a connection broken
        that it still needs. It forgives: after a failure (orderly = False, or another's word) nobody waits for work to be
        done, and a process that holds the store only until the others have read why."""
        until, left = time.monotonic() + CLOSING_SECONDS, [self._left(other) for other in self.others]
        try:
            while orderly and time.monotonic() < until and not self._all_ended():
                orderly = not self.word()
                time.sleep(0.02)
            self.board.set(self._left(self.rank), "1")
            until = time.monotonic() + BEAT_SECONDS + 1
            while holds_store and time.monotonic() < until and not self.board.check(left):
                time.sleep(0.02)
        except GONE:
            pass

    def _all_ended(self) -> bool:
        keys = [self._key(other) for other in self.others]
        return self.board.check(keys) and all(self.board.get(key) == ENDED.encode() for key in keys)

    # ---- watching ----

    def _key(self, rank: int) -> str:
        return f"treadle/alive/{rank}"

    def _left(self, rank: int) -> str:
        """That process needs the store no more."""
        return f"treadle/left/{rank}"

    def _run(self) -> None:
        count, since, seen = 0, 0.0, {other: ("", time.monotonic()) for other in self.others}
        while not self.closed.wait(BEAT_SECONDS):
            count += 1
            try:
                self.board.set(self._key(self.rank), f"{count:012d}")
                for other, (before, _) in seen.items():
                    there = self.board.check([self._key(other)])
                    now = self.board.get(self._key(other)).decode() if there else ""
                    if now != before or now == ENDED:
                        seen[other] = (now, time.monotonic())
                if not self.heard and self.word():
                    self.board.set(self._left(self.rank), "1")
            except GONE:  # the store's own process is gone
                if 0 in seen and seen[0][0] == ENDED:
                    return  # it was done, and has waited long enough
                if not self.closed.wait(self.silence / 4):
                    self._end(self.heard or "the process that holds the rendezvous is gone")
                return
            if self.heard and not self.failed:
                since = since or time.monotonic()
                if time.monotonic() - since > FAILED_SECONDS:
                    self._end(self.heard)
            for other, (_, when) in seen.items():
                if time.monotonic() - when > self.silence:
                    self._end(f"process {other} has given no sign of life for {self.silence:.0f} s")

    def _end(self, reason: str) -> None:
        line = f"rank {self.rank}: error: {reason}. The last checkpoint is intact; the same command continues\n"
        os.write(2, line.encode())
        os._exit(LOST_CODE)
