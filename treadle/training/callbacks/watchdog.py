"""Changes nothing; ends the process when a step hangs (train.step_timeout)."""

from __future__ import annotations

from treadle.monitor.watchdog import Watchdog
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context


class WatchdogCallback(Callback):
    """Ends a process whose step hangs."""

    name = "watchdog"

    watchdog: Watchdog | None = None

    def wanted(self, context: Context) -> bool:
        return context.config.train.step_timeout is not None

    def on_train_start(self, context: Context) -> None:
        self.watchdog = Watchdog(context.config.train.step_timeout, context.folder, context.world.rank)
        self.watchdog.__enter__()

    def before_step(self, context: Context) -> None:
        assert self.watchdog is not None
        self.watchdog.begin()

    def after_step(self, context: Context) -> None:
        assert self.watchdog is not None
        self.watchdog.end()

    def close(self) -> None:
        if self.watchdog is not None:
            self.watchdog.__exit__()
