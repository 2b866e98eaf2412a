"""What people say to a running training: signals, words typed into it, words sent by `treadle ctl`.

All of it is looked at between steps (and between the batches of an evaluation); nothing here interrupts a step.
`treadle ctl` leaves a command as a small file in the run's `control/` folder and waits for the reply beside it, so it
works from any terminal that sees the folder, and leaves no port open.
"""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from treadle.checkpoint.lock import LOCK_FILE
from treadle.errors import ConfigError, InputError
from treadle.files import write_atomically
from treadle.terminal import write

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
STOP_COMMAND_CODE = 75
CONTROL_FOLDER = "control"
WORDS = ("stop", "status", "save", "eval", "set", "help")
HELP = """stop                       finish the step, save and exit; the same command continues
status                     step, loss, learning rate, tokens per second, ETA, last checkpoint
save                       write a checkpoint after this step
eval                       evaluate after this step
set KEY=VALUE              change a key from the next step on (optim.learning_rate=1e-4)
help                       this text"""


@dataclass
class Command:
    """One line somebody said, and how to answer it."""

    line: str
    reply: Callable[[str], None]


class Control:
    """Collects requests; whoever is ready for them asks `commands()`, `stop_reason` and `save_requested`."""

    def __init__(
        self, folder: Path | None = None, say: Callable[[str], None] = write, read_stdin: bool = False
    ) -> None:
        self.stop_reason: str | None = None
        self.exit_code = 0
        self.save_requested = False
        self._signalled = False
        self._folder = folder / CONTROL_FOLDER if folder is not None else None
        self._say = say
        self._read_stdin = read_stdin
        self._typed: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Control:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._on_signal)
        for stale in self._command_files():  # said to an earlier process
            stale.unlink(missing_ok=True)
        if self._read_stdin:
            threading.Thread(target=self._listen, name="treadle-stdin", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for command in self._sent():
            command.reply("the training has ended")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_requested = True
        elif not self._signalled:  # the first here: that another process was told already makes it no second one
            self._signalled = True
            self.request_stop(signal.Signals(number).name, EXIT_CODES[signal.Signals(number)])
        else:
            os._exit(self.exit_code or STOP_COMMAND_CODE)

    def request_stop(self, reason: str, exit_code: int = STOP_COMMAND_CODE) -> None:
        """Asks for an end after this step; the first reason stays."""
        if self.stop_reason is None:
            self.stop_reason, self.exit_code = reason, exit_code

    # ---- words ----

    def commands(self) -> list[Command]:
        """What was typed or sent since the last call."""
        found = []
        while True:
            try:
                found.append(Command(self._typed.get_nowait(), self._say))
            except queue.Empty:
                return found + self._sent()

    def _command_files(self) -> list[Path]:
        if self._folder is None:
            return []
        try:
            return sorted(self._folder / name for name in os.listdir(self._folder) if name.endswith(".command"))
        except OSError:
            return []

    def _sent(self) -> list[Command]:
        found = []
        for path in self._command_files():
            try:
                line = str(json.loads(path.read_text(encoding="utf-8"))["line"])
                path.unlink()
            except (OSError, ValueError, KeyError, TypeError):
                path.unlink(missing_ok=True)
                continue
            answer = path.with_suffix(".reply")
            found.append(Command(line, lambda text, answer=answer: _write(answer, text)))  # type: ignore[misc]
        return found

    def _listen(self) -> None:
        """Reads lines from standard input. Its end is not `stop`; a background job never reads the terminal, which would
        stop the whole job (SIGTTIN)."""
        try:
            descriptor = sys.stdin.fileno()
        except (OSError, ValueError, AttributeError):
            return
        held = b""
        while not self._closed.is_set():
            try:
                if os.isatty(descriptor) and os.tcgetpgrp(descriptor) != os.getpgrp():
                    time.sleep(0.5)
                    continue
                if not select.select([descriptor], [], [], 0.2)[0]:
                    continue
                data = os.read(descriptor, 4096)
            except (OSError, ValueError):
                return
            if not data:
                return
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                if line.strip():
                    self._typed.put(line.decode("utf-8", "replace").strip())


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError:
        pass  # nobody can be told; training does not stop for that


def parse_command(line: str) -> tuple[str, str]:
    """("set", "optim.learning_rate=1e-4"); ConfigError for a word that is none of the commands."""
    word, _, rest = line.strip().partition(" ")
    word = word.lower().lstrip("/")
    if word not in WORDS:
        raise ConfigError(f"{word!r} is no command; there is: {', '.join(WORDS)}")
    return word, rest.strip()


def send(run: Path, line: str, timeout: float = 60.0) -> str:
    """Says a line to the process that trains `run` and returns its answer. InputError when nobody is training it."""
    parse_command(line)
    if not run.is_dir():
        raise InputError(f"{run} does not exist; give a run folder")
    trainer = holder(run)
    if trainer is None:
        raise InputError(f"nobody is training {run} now; start it: treadle train {run / 'config.toml'}")
    folder = run / CONTROL_FOLDER
    folder.mkdir(exist_ok=True)
    name = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}"
    command, answer = folder / f"{name}.command", folder / f"{name}.reply"
    write_atomically(command, json.dumps({"line": line}))
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if answer.exists():
            text = answer.read_text(encoding="utf-8")
            answer.unlink(missing_ok=True)
            return text
        if holder(run) is None and not answer.exists():  # it may have answered and ended since the line above
            command.unlink(missing_ok=True)
            raise InputError(f"the training of {run} ended before it could answer")
        time.sleep(0.05)
    return f"no answer in {timeout:.0f} s; {trainer} will act on it after its step"


def holder(run: Path) -> str | None:
    """Who trains the run ("process 12 on host"), or None when that process is gone."""
    try:
        text = (run / LOCK_FILE).read_text(encoding="utf-8").strip()
        _, number, _, host = text.split(" ", 3)
    except (OSError, ValueError):
        return None
    if host == socket.gethostname():
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return None
        except (PermissionError, ValueError):
            pass
    return text
