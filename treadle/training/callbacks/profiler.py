"""Changes nothing; writes a trace of some steps (log.profile)."""

from __future__ import annotations

from treadle.monitor.profiler import Profiler
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context


class ProfilerCallback(Callback):
    """Traces the steps that log.profile names."""

    name = "profiler"

    def wanted(self, context: Context) -> bool:
        self.profiler = Profiler(context.config.log.profile, context.log_folder)
        return context.config.log.profile is not None

    def before_step(self, context: Context) -> None:
        self.profiler.before(context.step + 1)

    def after_step(self, context: Context) -> None:
        self.profiler.after(context.step)
