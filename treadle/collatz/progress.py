"""How long work still takes, on a terminal as one live line and in a pipe as a line now and then; and signals that stop it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

from treadle.errors import Stopped
from treadle.terminal import is_terminal, visible, write

LIVE_SECONDS, PLAIN_SECONDS = 0.2, 10.0


def rounded(value: float) -> str:
    """20300000000.0 -> "2.03e10", 950.4 -> "950"."""
    if value < 10_000:
        return f"{value:.0f}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"; from two days on "12.5 days", from two years on "3.1 years"."""
    days = seconds / 86400
    if days >= 2:
        return f"{days:.1f} days" if days < 730 else f"{rounded(days / 365.25) if days > 36525 else f'{days / 365.25:.1f}'} years"
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Line:
    """The one line that says where work stands. quiet: nothing at all."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet, self.stream = quiet, stream or sys.stdout
        self.live = is_terminal(self.stream)
        self._open = False
        self._last = time.monotonic() if not self.live else 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for `show`: making the text costs more than not making it."""
        return not self.quiet and time.monotonic() - self._last >= (LIVE_SECONDS if self.live else PLAIN_SECONDS)

    def show(self, text: str) -> None:
        if self.quiet:
            return
        self._last = time.monotonic()
        if self.live:
            write(f"\r{visible(text)}\x1b[K", self.stream, end="", exact=True)
            self._open = True
        else:
            write(text, self.stream)

    def say(self, text: str) -> None:
        """A line that stays; with `quiet` on the error stream, since standard output is then for a program."""
        if self.quiet:
            write(text, sys.stderr)
            return
        self.clear()
        write(text, self.stream)

    def clear(self) -> None:
        if self._open:
            write("\r\x1b[K", self.stream, end="", exact=True)
            self._open = False


class Stop:
    """Whether, and by which signal, this process has been asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_signals(line: Line) -> Iterator[Stop]:
    """SIGINT and SIGTERM ask to stop; the second one ends by an exception, Stopped. Outside the main thread: nothing."""
    stop = Stop()

    def heard(number: int, frame: FrameType | None) -> None:
        again, stop.signal = stop.signal is not None, signal.Signals(number).name
        if again:
            raise Stopped(f"stopped by {stop.signal}")
        line.say(f"{stop.signal}: what is in work is finished first, for some seconds at most (once more: leave at once)")

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield stop
        return
    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
