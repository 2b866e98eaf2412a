"""Units computed by the workers of a Ray cluster (extra `ray`). What they find comes back here and is written down here.

The certificate is the only state: workers keep nothing, a unit whose worker is lost is given out again, and its result is
taken once, since Ray gives one result, or one error, for each reference.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from treadle.collatz import blocks
from treadle.collatz.workers import ATTEMPTS, GRACE, TICK, Done, Work, WorkerFailed, compute, worker_count
from treadle.ray_cluster import connected

NODES_SECONDS = 10.0  # between two looks at how large the cluster is


def completed(
    work: Iterator[Work], path: str, workers: int | str, address: str, stopping: Callable[[], bool],
    say: Callable[[str], None], sieve: str = "tree",
) -> Iterator[Done | None]:  # fmt: skip
    """Does all of `work` on a cluster, in any order; None at every tick. Ends early, without an error, when `stopping`.

    address: "ray" is the cluster that RAY_ADDRESS names or else one of this machine alone, with `workers` processes;
    otherwise as for ray.init, HOST:6379, ray://HOST:10001 or auto.
    """
    given = os.environ.get("RAY_ADDRESS") if address == "ray" else address
    ray, own = connected(given, worker_count(workers), "work on a cluster", "name it, as in --cluster HOST:6379")
    try:
        yield from _given_out(ray, work, path, None if own or workers == "auto" else worker_count(workers), stopping, say, sieve)
    finally:
        if own:
            ray.shutdown()


def _remote(work: Work, path: str, sieve: str) -> tuple[str, Done]:
    """On a worker: the work, and which algorithm its own treadle has."""
    return blocks.ALGORITHM, compute(work, path, sieve)


def _given_out(
    ray: Any, work: Iterator[Work], path: str, most: int | None, stopping: Callable[[], bool], say: Callable[[str], None],
    sieve: str,
) -> Iterator[Done | None]:  # fmt: skip
    # max_retries=0: a lost unit is given out again here, where it is said and counted.
    remote = ray.remote(num_cpus=1, max_retries=0)(_remote)
    pending: dict[Any, Work] = {}
    again: list[Work] = []
    deaths: dict[Work, int] = {}
    size, looked = 0, -NODES_SECONDS
    until, over = float("inf"), False
    try:
        while True:
            now = time.monotonic()
            if until == float("inf") and stopping():
                until = now + GRACE
            if now - looked > NODES_SECONDS:  # machines come and go
                size, looked = int(ray.cluster_resources().get("CPU", 1)) or 1, now
            room = min(size, most or size)
            while until == float("inf") and len(pending) < 2 * room and not (over and not again):
                task = again.pop() if again else next(work, None)
                if task is None:
                    over = True
                else:
                    pending[remote.remote(task, path, sieve)] = task
            if not pending or time.monotonic() > until:
                return
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=TICK)
            if not ready:
                yield None
            for reference in ready:
                task = pending.pop(reference)
                try:
                    algorithm, done = ray.get(reference)
                except ray.exceptions.RayTaskError as problem:
                    raise WorkerFailed(f"a worker of the cluster failed: {problem.cause!r}; does it have the same treadle?") from problem
                except ray.exceptions.RayError as problem:  # its process, its machine or its answer is gone
                    deaths[task] = deaths.get(task, 0) + 1
                    if deaths[task] >= ATTEMPTS:
                        raise WorkerFailed(f"{task} lost its worker {ATTEMPTS} times ({type(problem).__name__}); look at ray status, "
                                           "then run the same command again") from problem  # fmt: skip
                    say(f"a worker of the cluster was lost ({type(problem).__name__}); its unit is done again")
                    again.append(task)
                    continue
                if algorithm != blocks.ALGORITHM:
                    raise WorkerFailed(f"a worker of the cluster has the algorithm {algorithm}, this machine {blocks.ALGORITHM}; install the "
                                       "same treadle on both")  # fmt: skip
                yield done
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
