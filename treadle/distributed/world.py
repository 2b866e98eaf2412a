"""All processes of a run seen from one of them: who leads, and how they agree on small things.

Everything here moves a few numbers or a little JSON between hosts, never through a device: a GPU is not synchronised by
it. Tensors of the model travel elsewhere (ddp.py, fsdp.py). Nothing here pickles.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from treadle.distributed.environment import Launch, complete, detect
from treadle.distributed.heartbeat import Heartbeat
from treadle.distributed.meeting import in_first_process, meet, named, open_board
from treadle.distributed.settings import ParallelSettings
from treadle.errors import ConfigError, PeerFailed, PeerLost, TreadleError
from treadle.processes import deaf

T = TypeVar("T")
STILL_SECONDS = 5.0  # between two signs of life of a first process that is busy
LOST_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "socket", "timed out")


class World:
    """Process `rank` of `size`. A world of one does nothing and needs no process group."""

    def __init__(self, launch: Launch | None = None, group: Any = None, own: bool = False) -> None:
        launch = launch or Launch()
        self.rank, self.size = launch.rank, launch.size
        self.local_rank, self.local_size = launch.local_rank, launch.local_size
        self.group = group  # carries host tensors
        self.own = own  # this object made the process group and takes it down
        self.heartbeat: Heartbeat | None = None
        self.holds_store = False  # the others' keys go with this process
        self._orderly = True  # nothing went wrong that the others do not know of
        self._background: World | None = None

    # ---- beginning and end ----

    @staticmethod
    def open(settings: ParallelSettings | None = None, device: str = "auto", several: bool | None = None) -> World:
        """The world this process was started into: an initialised process group is adopted, else one is made when a
        launcher started several processes. ConfigError when `settings` expects another number of them, or when there are
        several and `several` is False."""
        settings = settings or ParallelSettings()
        launch = detect()
        if several is False and max(launch.size, dist.get_world_size() if dist.is_initialized() else 1) > 1:
            raise ConfigError("distributed=False, but several processes were started and would train the same run; start one, "
                              "or leave distributed out")  # fmt: skip
        if dist.is_initialized():
            here = Launch(dist.get_rank(), dist.get_world_size(), launch.local_rank, launch.local_size, "adopted")
            world = World(here, _host_group(settings))
        elif launch.size > 1:
            world = _initialised(launch, settings, device)
        else:
            world = World(launch)
        if settings.world_size not in (None, world.size):
            world.close()
            raise ConfigError(f"parallel.world_size = {settings.world_size}, but there are {world.size} process(es); start "
                              f"torchrun --nproc-per-node {settings.world_size}, or leave the key out")  # fmt: skip
        return world

    def close(self) -> None:
        """Ends the heartbeat and a process group made here, when the others are done too (heartbeat.py). Raises nothing:
        how this process ends is settled, and a signal that comes now changes it no more."""
        if not self.own:
            return
        self.own = False
        with deaf():
            if self.heartbeat is not None:
                self.heartbeat.close()
                self.heartbeat.wait_for_others(self._orderly, self.holds_store)
                self.heartbeat = None
            with contextlib.suppress(Exception):
                if dist.is_initialized():
                    self._take_down()

    def _take_down(self) -> None:
        # Where something went wrong, what is under way on a GPU will never end: it is dropped instead of waited for.
        abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
        dist.destroy_process_group() if self._orderly or abort is None else abort()

    def background(self) -> World:
        """The same processes over a group of its own, so that a thread's exchanges never mix with the main thread's."""
        if self.size == 1:
            return self
        if self._background is None:
            self._background = World(self._launch(), dist.new_group(backend="gloo"))
        return self._background

    def _launch(self) -> Launch:
        return Launch(self.rank, self.size, self.local_rank, self.local_size)

    @property
    def is_main_process(self) -> bool:
        """This process writes files and prints."""
        return self.rank == 0

    # ---- agreeing ----

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in fp64."""
        return self._reduced(values, torch.float64, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over all processes."""
        return self._reduced(values, torch.int64, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[Any], dtype: torch.dtype, operation: Any) -> list[Any]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=dtype)
        with self.watching():
            dist.all_reduce(tensor, operation, group=self.group)
        return tensor.tolist()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every process's value (anything JSON holds), by rank."""
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        longest = self.all_reduce_max([len(data)])[0]
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.zeros_like(mine) for _ in range(self.size)]
        with self.watching():
            dist.all_gather(parts, mine, group=self.group)
        return [json.loads(part.numpy().tobytes().rstrip(b"\0")) for part in parts]

    def on_main_first(self, action: Callable[[], T]) -> T:
        """Runs `action` in the first process and returns its result (anything JSON holds) in all of them. An error there
        is raised here too, as PeerFailed, which is not printed again."""
        if self.size == 1:
            return action()
        outcome: dict[str, Any] = {}
        problem: BaseException | None = None
        if self.is_main_process:
            try:
                outcome["value"] = action()
            except Exception as raised:
                problem = raised
                outcome["error"] = str(raised) or type(raised).__name__
                outcome["code"] = raised.exit_code if isinstance(raised, TreadleError) else 1
        outcome = self._told(outcome)
        if problem is not None:
            raise problem
        if "error" in outcome:
            raise PeerFailed(outcome["error"], outcome["code"])
        return outcome["value"]

    def on_main_slowly(self, action: Callable[[], T]) -> T:
        """`on_main_first` for what may take longer than processes wait for each other: they hear every few seconds that it goes on."""
        if self.size == 1:
            return action()
        made: Future[T] = Future()

        def work() -> None:
            try:
                made.set_result(action())
            except BaseException as problem:  # raised where the result is asked for
                made.set_exception(problem)

        if self.is_main_process:
            Thread(target=work, name="treadle-first-process", daemon=True).start()
        while not self.on_main_first(lambda: bool(wait([made], STILL_SECONDS).done)):
            pass
        return self.on_main_first(made.result)

    def _told(self, value: Any) -> Any:
        """What the first process says."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(data) if self.is_main_process else 0])
        with self.watching():
            dist.broadcast(size, 0, group=self.group)
            data = data if self.is_main_process else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, 0, group=self.group)
        return json.loads(data.numpy().tobytes())

    def agree(self, problem: Exception | None) -> None:
        """Raises in all processes when one has a problem: its own error in that one, PeerFailed in the others."""
        if self.size == 1 and problem is None:
            return
        code = problem.exit_code if isinstance(problem, TreadleError) else 1
        found = self.all_gather_object(None if problem is None else [str(problem), code])
        if problem is not None:
            raise problem
        for rank, failed in enumerate(found):
            if failed is not None:
                raise PeerFailed(f"process {rank}: {failed[0]}", failed[1])

    # ---- losing others ----

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Turns the many errors of a broken connection into PeerLost."""
        try:
            yield
        except RuntimeError as problem:
            if self.size == 1 or isinstance(problem, TreadleError) or not is_lost(problem):
                raise
            self._orderly = False
            reason = self.heartbeat.reason() if self.heartbeat is not None else ""
            raise PeerLost(
                f"{reason or 'another process ended or cannot be reached'}. The last checkpoint is intact; the same "
                "command continues"
            ) from problem

    def failed(self, problem: BaseException) -> None:
        """Leaves word for the others why this process ends."""
        self._orderly = False
        if self.heartbeat is not None:
            self.heartbeat.leave_word(self._in_words(problem))

    @staticmethod
    def _in_words(problem: BaseException) -> str:
        if isinstance(problem, KeyboardInterrupt):
            return "stopped by SIGINT"
        if isinstance(problem, SystemExit):
            return "stopped by SIGTERM" if problem.code == 143 else f"exit code {problem.code}"
        return str(problem).splitlines()[0] if str(problem) else type(problem).__name__


def is_lost(problem: BaseException) -> bool:
    """An error of communication rather than of computing."""
    text = str(problem).lower()
    return isinstance(problem, dist.DistError) or any(word in text for word in LOST_WORDS)


def _initialised(launch: Launch, settings: ParallelSettings, device: str) -> World:
    complete(os.environ, launch)
    cuda = device != "cpu" and torch.cuda.is_available()
    if settings.backend == "nccl" and not cuda:
        raise ConfigError("parallel.backend = nccl, but no GPU is used here; use --backend gloo or leave it out")
    backend = "cpu:gloo,cuda:nccl" if cuda and settings.backend != "gloo" else "gloo"
    if cuda:
        if launch.local_rank >= torch.cuda.device_count():
            raise ConfigError(f"process {launch.rank} is number {launch.local_rank} on its machine, which has "
                              f"{torch.cuda.device_count()} GPU(s); start at most one process a GPU")  # fmt: skip
        torch.cuda.set_device(launch.local_rank)
    timeout = datetime.timedelta(seconds=settings.communication_timeout)
    try:
        board, store = open_board(launch, timeout)
        name = meet(board, launch, timeout)
        store = named(store, name)
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as problem:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PeerLost(f"process {launch.rank} of {launch.size} could not meet the others at {where} "
                       f"({str(problem).splitlines()[0]}); check that all were started and can reach it") from problem  # fmt: skip
    world = World(launch, dist.group.WORLD, own=True)
    world.holds_store = launch.rank == 0 and in_first_process(board)
    world.heartbeat = Heartbeat.start(named(board, name), launch.rank, launch.size)
    atexit.register(world.close)  # a script that opened it by making a Trainer has nobody else who closes it
    return world


def _host_group(settings: ParallelSettings) -> Any:
    """A group that carries host tensors: the default one if gloo is in it, else one beside it."""
    if "gloo" in str(dist.get_backend_config()):
        return dist.group.WORLD
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=settings.communication_timeout))
