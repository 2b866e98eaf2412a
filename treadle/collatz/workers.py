"""Units computed side by side on this machine: threads where the kernel lets go of the interpreter's lock, else processes.

Both give finished work as it comes and None several times a second, so that whoever writes it down can show progress and be
stopped. Stopping waits a few seconds for what is in work and drops the rest: it is done again at the next start.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from treadle.collatz import blocks
from treadle.collatz.blocks import Totals, Unit
from treadle.collatz.certificates import Numbers
from treadle.errors import ConfigError, TreadleError
from treadle.processes import begin_data_worker

Work = Unit | Numbers
Kind = Literal["threads", "processes"]
TICK = 0.2  # seconds between two looks at progress and signals
GRACE = 5.0  # seconds that work begun before a stop may still take
ATTEMPTS = 4  # at one unit whose worker dies; more deaths are no accident


@dataclass(frozen=True)
class Done:
    """One finished piece of work and the seconds that it took."""

    work: Work
    totals: Totals
    seconds: float


class WorkerFailed(TreadleError):
    """Computing a unit failed, or killed its process several times."""


def compute(work: Work, path: str, sieve: str = "tree") -> Done:
    """The totals of one unit, or of the few numbers of a ragged end."""
    began = time.perf_counter()
    if isinstance(work, Numbers):
        # Even numbers halve, 1 mod 4 are below themselves after three steps: as blocks.run_unit, with sieve "none".
        totals = blocks.every(n for n in range(work.first, work.first + work.count) if n % 4 == 3)
    else:
        totals = blocks.run_unit(work, path, sieve)
    return Done(work, totals, time.perf_counter() - began)


def worker_count(asked: str | int) -> int:
    """ "auto" is one for each core that this process may use; ConfigError for less than 1."""
    if asked == "auto":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not str(asked).isascii() or not str(asked).isdigit() or not 1 <= int(asked) <= 4096:
        raise ConfigError(f"--workers {asked}: write auto or a number from 1 on, as in --workers 2")
    return int(asked)


def best_kind(path: str) -> Kind:
    """Compiled units run beside each other in threads and share their tables; the others hold the interpreter's lock."""
    return "threads" if path == "numba" else "processes"


def completed(
    work: Iterator[Work], path: str, workers: int, stopping: Callable[[], bool], sieve: str = "tree", kind: Kind | None = None
) -> Iterator[Done | None]:
    """Does all of `work`, in any order; None at every tick. Ends early, without an error, when `stopping`."""
    return (_threads if (kind or best_kind(path)) == "threads" else _processes)(work, path, workers, stopping, sieve)


def _threads(work: Iterator[Work], path: str, workers: int, stopping: Callable[[], bool], sieve: str) -> Iterator[Done | None]:
    tasks: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[Done | BaseException] = queue.SimpleQueue()
    dropped = threading.Event()

    def serve() -> None:
        while (task := tasks.get()) is not None and not dropped.is_set():
            try:
                results.put(compute(task, path, sieve))
            except BaseException as problem:  # it is raised again where the results are read
                results.put(problem)

    # Daemons: one inside a long unit does not keep a stopped process from ending.
    threads = [threading.Thread(target=serve, name=f"collatz-{number}", daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    waiting, until, over = 0, float("inf"), False  # waiting: given out and not back
    try:
        while True:
            if until == float("inf") and stopping():
                until = time.monotonic() + GRACE
                while _taken(tasks):  # what no thread has begun
                    waiting -= 1
            while not over and until == float("inf") and waiting < 2 * workers:  # one each at hand, so that none waits for us
                task = next(work, None)
                over = task is None
                if task is not None:
                    tasks.put(task)
                    waiting += 1
            if waiting <= 0 or time.monotonic() > until:
                return
            try:
                result = results.get(timeout=TICK)
            except queue.Empty:
                yield None
                continue
            waiting -= 1
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        dropped.set()
        for _ in threads:
            tasks.put(None)


def _taken(tasks: queue.SimpleQueue[Work | None]) -> bool:
    try:
        return tasks.get_nowait() is not None
    except queue.Empty:
        return False


class _Worker:
    """A process that computes one unit after another. It ends with its parent, however that ends."""

    def __init__(self, context: Any, path: str, sieve: str) -> None:
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, path, sieve), daemon=True)
        self.process.start()
        other.close()
        self.task: Work | None = None

    def give(self, task: Work) -> None:
        self.task = task
        try:
            self.connection.send(task)
        except OSError:  # it is dead, which is seen when its answer is read
            pass

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, path: str, sieve: str) -> None:
    begin_data_worker()
    try:
        while True:
            task = connection.recv()
            try:
                answer: Done | str = compute(task, path, sieve)
            except TreadleError as problem:
                answer = str(problem)
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)
    except (EOFError, OSError):  # the parent is gone, or has closed its end
        pass


def _processes(work: Iterator[Work], path: str, workers: int, stopping: Callable[[], bool], sieve: str) -> Iterator[Done | None]:
    context = multiprocessing.get_context("spawn")  # forking a process that runs threads is not safe
    pool: list[_Worker] = []
    again: list[Work] = []  # of workers that died
    deaths: dict[Work, int] = {}
    until, over = float("inf"), False
    try:
        while True:
            if until == float("inf") and stopping():
                until = time.monotonic() + GRACE
            idle = [worker for worker in pool if worker.task is None]
            while until == float("inf") and (idle or len(pool) < workers) and not (over and not again):
                task = again.pop() if again else next(work, None)
                if task is None:
                    over = True
                    break
                if not idle:
                    pool.append(_Worker(context, path, sieve))
                    idle = pool[-1:]
                idle.pop().give(task)
            busy = {worker.connection: worker for worker in pool if worker.task is not None}
            if not busy or time.monotonic() > until:
                return
            ready = wait(list(busy), TICK)
            if not ready:
                yield None
            for connection in ready:
                worker = busy[connection]
                task, worker.task = worker.task, None
                assert task is not None
                try:
                    answer = worker.connection.recv()
                except (EOFError, OSError):
                    worker.end()
                    pool.remove(worker)
                    again.append(task)
                    deaths[task] = deaths.get(task, 0) + 1
                    if deaths[task] >= ATTEMPTS:
                        raise WorkerFailed(f"the process of {task} was killed {ATTEMPTS} times; is there enough memory? "
                                           "Try again with fewer --workers") from None  # fmt: skip
                    continue
                if not isinstance(answer, Done):
                    raise WorkerFailed(str(answer))
                yield answer
    finally:
        for worker in pool:
            worker.end()
