"""Child processes that never outlive their parent."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl.h


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Called in a child: Linux sends it this signal when the process that started it ends, also by kill -9."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
