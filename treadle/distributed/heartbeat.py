"""Noticing within a minute that another process is gone, also where a GPU would wait for it for ever.

Every process writes a counter into the rendezvous store every few seconds and reads the others'. gloo notices a lost
process by itself, at once; NCCL waits out its timeout of minutes.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch.distributed as dist

BEAT_SECONDS, SILENCE_SECONDS, WORD_SECONDS = 3.0, 40.0, 2.0
LOST_CODE = 75
WORD = "treadle/word"


class Heartbeat:
    """One daemon thread; ends this process with code 75 when another one falls silent."""

    def __init__(self, store: Any, rank: int, size: int, silence: float = SILENCE_SECONDS) -> None:
        self.store, self.rank, self.size, self.silence = store, rank, size, silence
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="treadle-heartbeat", daemon=True)

    @staticmethod
    def start(rank: int, size: int) -> Heartbeat | None:
        """Over the default process group's store; None where torch does not give it."""
        find = getattr(dist.distributed_c10d, "_get_default_store", None)
        if find is None:
            return None
        beat = Heartbeat(find(), rank, size)
        beat.thread.start()
        return beat

    def leave_word(self, text: str) -> None:
        """Says why this process ends; the first word stays."""
        try:
            self.store.compare_set(WORD, "", f"process {self.rank} ended: {text}")
        except RuntimeError:
            pass  # the store went with its process

    def reason(self) -> str:
        """Why another process ended, when it said so."""
        until = time.monotonic() + WORD_SECONDS  # its connection may break before its word arrives
        while time.monotonic() < until:
            try:
                if self.store.check([WORD]):
                    return self.store.get(WORD).decode(errors="replace")
            except RuntimeError:
                return ""
            time.sleep(0.1)
        return ""

    def close(self) -> None:
        """This process ends in order: the others need not miss it."""
        self.closed.set()
        self.thread.join(timeout=5)  # a store that goes while a thread asks it aborts the process
        try:
            self.store.set(self._key(self.rank), "ended")
        except RuntimeError:
            pass

    def _key(self, rank: int) -> str:
        return f"treadle/alive/{rank}"

    def _run(self) -> None:
        count, seen = 0, {r: ("", time.monotonic()) for r in range(self.size) if r != self.rank}
        while not self.closed.wait(BEAT_SECONDS):
            count += 1
            try:
                self.store.set(self._key(self.rank), str(count))
                for rank, (before, _) in seen.items():
                    there = self.store.check([self._key(rank)])
                    now = self.store.get(self._key(rank)).decode() if there else ""
                    if now != before or now == "ended":
                        seen[rank] = (now, time.monotonic())
            except RuntimeError:  # the store's own process is gone
                if not self.closed.wait(self.silence / 4):
                    self._end("the process that holds the rendezvous is gone")
                return
            for rank, (_, when) in seen.items():
                if time.monotonic() - when > self.silence:
                    self._end(f"process {rank} has given no sign of life for {self.silence:.0f} s")

    def _end(self, reason: str) -> None:
        line = f"rank {self.rank}: error: {reason}. The last checkpoint is intact; the same command continues\n"
        os.write(2, line.encode())
        os._exit(LOST_CODE)
