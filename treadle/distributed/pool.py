"""Commands of treadle in processes of their own, so many at a time: on this machine, or on a Ray cluster.

What a grid and a suite of runs share. Children on this machine are told to stop, and save themselves, when this process leaves
early; they end with it also where it is killed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from treadle.distributed.launch import GRACE_SECONDS, threads_of_each
from treadle.processes import end_with_parent, orderly_end
from treadle.ray_cluster import connected

POLL_SECONDS = 0.05
Work = TypeVar("Work")


@dataclass(frozen=True)
class Command(Generic[Work]):
    """`python -m ARGUMENTS`, whose output goes to a file; `work` is what it is for."""

    work: Work
    arguments: tuple[str, ...]
    out: Path


class Pool(ABC):
    """Where commands run, `workers` at a time."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    @abstractmethod
    def start(self, command: Command[Any]) -> Any:
        """A handle of the running command."""

    @abstractmethod
    def code(self, handle: Any) -> int | None:
        """The exit code, or None while it runs."""

    @abstractmethod
    def stop(self, handles: list[Any]) -> None:
        """Ends what runs, in order."""


class LocalPool(Pool):
    """Processes of this machine, which share its cores evenly unless OMP_NUM_THREADS is set."""

    def start(self, command: Command[Any]) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if self.workers > 1:
            environment.setdefault("OMP_NUM_THREADS", threads_of_each(self.workers))
        command.out.parent.mkdir(parents=True, exist_ok=True)
        with open(command.out, "wb") as out:  # a session of its own: Ctrl-C reaches it once, from here
            return subprocess.Popen([sys.executable, "-m", *command.arguments], stdout=out, stderr=subprocess.STDOUT,
                                    stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
                                    preexec_fn=end_with_parent)  # fmt: skip

    def code(self, handle: subprocess.Popen[bytes]) -> int | None:
        return handle.poll()

    def stop(self, handles: list[subprocess.Popen[bytes]]) -> None:
        for child in handles:
            child.terminate()
        for child in handles:
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()


class RayPool(Pool):
    """Tasks of a Ray cluster (RAY_ADDRESS, or one started here), one core each. All machines see the same folders. A task that is
    stopped ends its command by the same signal as on one machine."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        ray, _ = connected(os.environ.get("RAY_ADDRESS"), workers, "--ray", "name it in RAY_ADDRESS, or leave --ray out")
        self._ray = ray
        self._task = ray.remote(num_cpus=1, max_retries=0)(_on_a_worker)

    def start(self, command: Command[Any]) -> Any:
        return self._task.remote(command.arguments, str(command.out.resolve()), os.getcwd(), sys.path[:])

    def code(self, handle: Any) -> int | None:
        done, _ = self._ray.wait([handle], timeout=0)
        if not done:
            return None
        try:
            return int(self._ray.get(handle))
        except self._ray.exceptions.RayError:  # the machine is gone: the same command goes on where the run has saved
            return 75

    def stop(self, handles: list[Any]) -> None:
        for handle in handles:
            self._ray.cancel(handle, force=False)
        self._ray.wait(handles, num_returns=len(handles), timeout=GRACE_SECONDS) if handles else None


def _on_a_worker(arguments: tuple[str, ...], out: str, folder: str, path: list[str]) -> int:
    """Runs in a worker of the cluster, in the folder and with the modules of the process that asked."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or "1", "PYTHONPATH": os.pathsep.join(path)}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with open(out, "wb") as stream:
        child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=stream, stderr=subprocess.STDOUT,
                                 stdin=subprocess.DEVNULL, env=environment, cwd=folder, preexec_fn=end_with_parent)  # fmt: skip
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait(GRACE_SECONDS)


def run_all(
    pool: Pool, take: Callable[[], Command[Work] | None], ended: Callable[[Work, int], None],
    started: Callable[[Work], None] | None = None,
) -> None:  # fmt: skip
    """Runs what `take` gives until it gives nothing and nothing runs any more. It is asked again after each end, so that it may
    hold back what waits for others; an error that `ended` raises ends all."""
    with _running(pool) as running:
        while True:
            while len(running) < pool.workers and (command := take()) is not None:
                running[pool.start(command)] = command.work
                if started is not None:
                    started(command.work)
            if not running:
                return
            time.sleep(POLL_SECONDS)
            for handle, code in [(handle, code) for handle in running if (code := pool.code(handle)) is not None]:
                ended(running.pop(handle), code)


@contextmanager
def _running(pool: Pool) -> Iterator[dict[Any, Any]]:
    running: dict[Any, Any] = {}
    with orderly_end():
        try:
            yield running
        finally:
            pool.stop(list(running))


def folder_name(text: str) -> str:
    """A part of a folder's name from any text."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text)


def last_words(out: Path, code: int) -> str:
    """The error that a command ended with, from its output."""
    lines = out.read_text(encoding="utf-8", errors="replace").splitlines() if out.is_file() else []
    return next((line for line in reversed(lines) if line.startswith("error:")), f"exit code {code}")
