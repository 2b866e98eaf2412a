"""`treadle train --devices N`: the same command in N processes on this machine.

Signals are passed on, standard input goes to the first process, and when one ends badly the others learn how and get time
to save or to say why before they are ended. The processes meet in a folder made for this launch (notes.py), so that two
runs, or a run and its restart, never meet each other. Machines beyond this one are torchrun's business.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from treadle.distributed.notes import WORD, Notes, meeting_folder
from treadle.errors import ConfigError
from treadle.processes import end_with_parent

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 60.0
# What says most about a failure comes first; 75 only says that another process was lost.
MILD = (75, 130, 143)


_ports = itertools.count(os.getpid())


def free_port() -> int:
    """A port that nobody has, another one each time. Below 32768: above are (on Linux) those of outgoing connections, one of
    which could take it before it is opened."""
    while True:
        port = 10000 + next(_ports) % 22000
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_each(count: int) -> str:
    """OMP_NUM_THREADS of each of `count` processes that share this machine."""
    return str(max(1, (os.cpu_count() or 1) // count))


def gpus(device: str) -> int:
    """GPUs that `device` (of the run section) may mean here; torch is asked only where there is a driver."""
    if device.startswith("cpu") or not any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return 0
    import torch

    return torch.cuda.device_count()


def refuse_too_many(count: int, device: str) -> None:
    """ConfigError when this machine has fewer GPUs, or without any fewer cores, than `count` processes need; two always
    go, so that what happens between processes can be tried on one core."""
    there = gpus(device)
    most, what = (there, f"{there} GPU(s)") if there else (max(2, cores()), f"{cores()} core(s) and no GPU to use")
    if count > most:
        typed = f"type --devices {most}" if most > 1 else "leave --devices out"
        elsewhere = " or --device cpu" if there else ""
        raise ConfigError(f"run.devices = {count}, but this machine has {what}: {typed}{elsewhere}. More machines: one command "
                          "on each with torchrun (docs/cluster.md)")  # fmt: skip


def run_processes(count: int, arguments: Sequence[str], grace: float = GRACE_SECONDS) -> int:
    """Runs `python -m treadle ARGUMENTS` in `count` processes and returns the gravest exit code."""
    common = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    # Nobody listens there: libraries look for the names.
    common.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    common.setdefault("OMP_NUM_THREADS", threads_of_each(count))
    with meeting_folder(common) as folder:
        return _run(common, count, arguments, grace, Notes(folder))


def _run(common: dict[str, str], count: int, arguments: Sequence[str], grace: float, notes: Notes) -> int:
    processes = [
        subprocess.Popen(
            [sys.executable, *_safe_path(), "-m", "treadle", *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches them once, through here
            preexec_fn=end_with_parent,
        )
        for rank in range(count)
    ]
    assert processes[0].stdin is not None
    threading.Thread(target=_pass_input, args=(processes[0].stdin,), daemon=True).start()

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        return _wait(processes, grace, notes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _safe_path() -> list[str]:
    """-P unless this process itself imports from the folder it was started in: `-m` would let files there stand in for
    modules, and the folder may be somebody else's."""
    return [] if {"", os.getcwd()} & set(sys.path) else ["-P"]


def _wait(processes: list[subprocess.Popen[bytes]], grace: float, notes: Notes) -> int:
    first_failure: float | None = None
    told: set[int] = set()
    while None in (codes := [process.poll() for process in processes]):
        for rank, code in enumerate(codes):
            if code and rank not in told:
                told.add(rank)
                first_failure = first_failure or time.monotonic()
                _leave_word(notes, rank, code)
        if first_failure is not None:
            late = time.monotonic() - first_failure
            for process in processes:
                if process.poll() is None and late > grace:
                    process.kill() if late > grace + 10 else process.terminate()
        time.sleep(0.05)
    return gravest([process.returncode for process in processes])


def _leave_word(notes: Notes, rank: int, code: int) -> None:
    """How a process ended that could not say it itself; a stop on request is agreed by all and needs no word."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if code not in MILD:
        with contextlib.suppress(OSError):
            notes.compare_set(WORD, "", f"process {rank} {how}")


def gravest(codes: Sequence[int]) -> int:
    """One exit code for all: a failure of its own before a kill, a kill before a stop, a stop before a lost peer."""
    positive = [code if code >= 0 else 128 - code for code in codes]
    bad = [code for code in positive if code]
    own = [code for code in bad if code < 128 and code not in MILD]
    killed = [code for code in bad if code >= 128 and code not in MILD]
    return (own or killed or sorted(bad, reverse=True) or [0])[0]


def _pass_input(stream: BinaryIO) -> None:
    try:
        descriptor = sys.stdin.fileno()
        if os.isatty(descriptor) and os.tcgetpgrp(descriptor) != os.getpgrp():
            return  # a background job never reads the terminal
        while data := os.read(descriptor, 4096):
            stream.write(data)
            stream.flush()
    except (OSError, ValueError, AttributeError):
        pass  # no input, or the first process is gone
