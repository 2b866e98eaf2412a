"""What people say to a running training: signals, looked at between steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Control:
    """Turns SIGINT and SIGTERM into a request to stop after the step; a second one exits at once. SIGUSR1 saves."""

    def __init__(self) -> None:
        self.stop_signal: signal.Signals | None = None
        self.save_requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Control:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_requested = True
        elif self.stop_signal is None:
            self.stop_signal = signal.Signals(number)
        else:
            os._exit(EXIT_CODES[self.stop_signal])

    def should_stop(self) -> bool:
        return self.stop_signal is not None

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.stop_signal] if self.stop_signal is not None else 0
