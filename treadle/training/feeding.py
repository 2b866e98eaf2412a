"""Changes nothing: the data of a training, from a position on, opened again after a rollback or with more workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from treadle.data.base import Position
from treadle.data.batch import Batch
from treadle.data.loader import Item, Loader
from treadle.errors import DataError
from treadle.training.callbacks.base import Callbacks
from treadle.training.context import Context

WAIT_STEPS, WAIT_SHARE, AUTO_WORKERS = 50, 0.1, 2  # num_workers = auto looks once, after this many steps


class Feed:
    """The batches of one start of a run. While a step waits for them, the callbacks may end the waiting."""

    def __init__(self, context: Context, callbacks: Callbacks) -> None:
        self.dataset, self.callbacks, self.say = context.dataset, callbacks, context.say
        self.tell, self.schedule = context.tell_of_data, context.plan
        self.pin, wanted = context.device.type == "cuda", context.config.data
        self.automatic = wanted.num_workers == "auto"  # no workers, unless steps wait for data
        self.workers = 0 if wanted.num_workers == "auto" else int(wanted.num_workers)
        self.plan = replace(context.batch_plan, prefetch=wanted.prefetch_factor)
        self.loader: Loader | None = None
        self._items: Iterator[Item] = iter(())
        self._position: Position = None
        self._waited = 0.0  # before this loader
        self.begun_at: list[Position] = []  # where each global batch of the last step begins

    def open(self, position: Position, steps: int, rows: int | None) -> None:
        """Reads `steps` steps from `position` on, of which the first `rows` rows are wanted (None: all)."""
        self.close()
        self._position = position
        self.plan = replace(self.plan, steps=steps, rows=rows, workers=self.workers)
        self.loader = Loader(self.dataset, position, self.plan, pin=self.pin, idle=self.callbacks.stop_asked_alone)
        self._items = iter(self.loader)

    def next(self, step: int) -> Item | None:
        """(micro-batches of step number `step`, the position after them), as its schedules of batches and lengths say. None
        when a stop was asked for meanwhile, or the data has ended, which it does in all processes at the same step: then
        training ends with an error, saved."""
        taken: list[Batch] = []
        self.begun_at = []
        for _ in range(self.schedule.batches_at(step)):
            self.begun_at.append(self._position)
            item = self._next()
            if item is None:
                return None
            taken += item[0]
        length = self.schedule.length_at(step)
        return (taken if length is None else [batch.cut(length) for batch in taken]), self._position

    def _next(self) -> Item | None:
        assert self.loader is not None
        self._maybe_more_workers()
        item = next(self._items, None)
        if item is None and not self.callbacks.stop_asked_alone():
            left = (self.plan.steps or 0) - self.loader.steps
            unit = "steps" if self.schedule.batch_sizes == ((0, 1),) else "global batches"
            self.callbacks.fail(DataError(f"the data ended {left} {unit} before the training; train for fewer steps: --max_steps"))
        if item is not None:
            self._position = item[1]
            for line in self.dataset.news(item[1], self.plan):
                self.tell(line)
        return item

    def _maybe_more_workers(self) -> None:
        loader = self.loader
        assert loader is not None
        if not self.automatic or loader.steps < WAIT_STEPS:
            return
        self.automatic = False
        share = loader.wait_share()
        if share > WAIT_SHARE:
            self.say(f"waiting for data took {share:.0%} of the first {WAIT_STEPS} steps: {AUTO_WORKERS} data workers "
                     "from here on (--num_workers chooses)")  # fmt: skip
            self.workers = AUTO_WORKERS
            taken = loader.steps
            left = None if self.plan.rows is None else self.plan.rows - taken * self.plan.global_batch_size
            self.open(self._position, (self.plan.steps or 0) - taken, left)

    def waits(self, seconds: float) -> tuple[float, float, float]:
        """After a step of so many seconds: seconds that steps have waited since this start, the share of the time since the
        data was opened that went into waiting, and the seconds of its steps."""
        assert self.loader is not None
        self.loader.computed += seconds
        return self._waited + self.loader.waited, self.loader.wait_share(), self.loader.computed

    def close(self) -> None:
        """Ends the workers; time spent waiting is kept."""
        if self.loader is not None:
            self._waited += self.loader.waited
            self.loader.close()
            self.loader = None
