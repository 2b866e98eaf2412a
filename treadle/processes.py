"""Child processes that never outlive their parent, and signals that end a process in order."""

from __future__ import annotations

import contextlib
import ctypes
import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl.h


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Called in a child: Linux sends it this signal when the process that started it ends, also by kill -9."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def begin_data_worker() -> None:
    """Called in a child that makes data: it never outlives a killed training, and Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)


def waited_for_cores() -> float:
    """Seconds that the living threads of this process have had work to do and no core to do it on (Linux's run_delay,
    Documentation/scheduler/sched-stats); nan where nothing tells."""
    nanoseconds = 0
    try:
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
                nanoseconds += int((thread / "schedstat").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return math.nan
    return nanoseconds / 1e9


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """SIGINT and SIGTERM are not heard inside; what ends here ends anyway."""
    with _handling({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}):
        yield


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """SIGTERM ends this process with code 143 by way of every `finally`, as Ctrl-C does with 130."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handling({signal.SIGTERM: leave}):
        yield


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
