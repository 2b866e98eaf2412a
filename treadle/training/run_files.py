"""Changes the run folder: its lock, config.toml, tokenizer, environment.json and summary.json."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from treadle.checkpoint.copies import place_of, refuse_another
from treadle.checkpoint.layout import steps_in
from treadle.checkpoint.lock import RunLock
from treadle.checkpoint.writer import clean
from treadle.errors import ConfigError, Diverged, PeerFailed, PeerLost, Stopped, TreadleError
from treadle.files import write_atomically
from treadle.monitor import records
from treadle.ops.memory import peak_memory_gb
from treadle.training.config import Recipe
from treadle.training.context import Context


def refuse_used(recipe: Recipe) -> None:
    """ConfigError for a folder that already holds a run."""
    if steps_in(recipe.checkpoint_folder) or (recipe.folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"{recipe.folder} already holds a run; continue it with resume=True or use another output_dir"
        )
    refuse_mirrored(recipe.checkpoint.mirror, recipe.folder)


def refuse_mirrored(url: str | None, folder: Path) -> None:
    """ConfigError for a new run whose mirror holds another one of its name."""
    if url is not None:
        refuse_another(place_of(url, folder), None)


class RunFolder:
    """The folder of one training, while it is being trained."""

    def __init__(self, context: Context, parameter_count: int) -> None:
        self.context, self.parameter_count = context, parameter_count
        self._lock: RunLock | None = None
        self._opened = False

    def open(self) -> None:
        """Takes the run's lock and removes what an interrupted save left."""
        if not self._opened:
            self.context.world.on_main_first(lambda: self.adopt_lock(RunLock(self.context.folder)))
            self._opened = True

    def adopt_lock(self, lock: RunLock | None) -> None:
        """Takes over a lock that was acquired before the trainer was built; only the first process has one."""
        self._lock, self._opened = lock, True
        if lock is not None:
            clean(self.context.checkpoint_folder)

    def close(self) -> None:
        """Lets go of the run's lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._opened = False

    def write_start(self) -> None:
        """On disk before the first step, so that a kill at any time can be continued."""
        context = self.context
        folder, tokenizer = context.folder, context.dataset.tokenizer
        context.log_folder.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None and (context.step == 0 or not (folder / "tokenizer").is_dir()):
            tokenizer.save(folder / "tokenizer")
        write_atomically(folder / "config.toml", context.config.to_toml())
        records.write_json(folder / "environment.json", records.environment())
        for name, table in context.strategy.files().items():
            records.write_json(folder / name, table)
        context.began()
        started = "resumed" if context.step else "started"
        context.emit(started, step=context.step, precision=context.precision, plan=asdict(context.plan),
                     processes=context.world.size, parallel=context.strategy.mode)  # fmt: skip

    def stopped(self, reason: str, exit_code: int) -> Stopped:
        """Everything that is said when a run stops on request, and the error that carries its exit code."""
        context, step = self.context, self.context.step
        context.stop_reason = reason
        context.emit("stopped", step=step, reason=reason)
        context.alert("stopped", f"stopped by {reason} after step {step}; saved", step=step)
        context.tell("on_stop")
        context.console.stop()
        context.console.say(f"Stopped by {reason} after step {step}; saved. The same command continues.")
        stop = Stopped(f"stopped by {reason}")
        stop.exit_code = exit_code
        return stop

    def ended_badly(self, problem: BaseException) -> None:
        """Leaves word: to the other processes, in summary.json, and to whoever gets alerts."""
        if not isinstance(problem, (PeerFailed, PeerLost, Stopped)):
            self.context.world.failed(problem)
        if isinstance(problem, TreadleError):
            status = {Stopped: "stopped", Diverged: "diverged"}.get(type(problem), "failed")
            self.summary(status, problem.exit_code)
            if not isinstance(problem, Stopped):
                self.context.alert("stopped", f"stopped at step {self.context.step}: {type(problem).__name__}")

    def summary(self, status: str, exit_code: int = 0) -> dict[str, Any]:
        """Writes and returns summary.json, and tells the callbacks that this is the end."""
        context, state = self.context, self.context.state
        if status == "finished":
            context.emit("finished", step=state.step)
            context.alert("finished", f"finished at step {state.step}", step=state.step)
        best = context.best_so_far()
        context.summary = {
            "status": status,
            "exit_code": exit_code,
            "step": state.step,
            "max_steps": context.plan.max_steps,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "cpu_seconds": state.cpu_seconds,
            "parameters": self.parameter_count,
            "architecture": context.model.arch,
            "precision": context.precision,
            "processes": context.world.size,
            "parallel": context.strategy.mode,
            "peak_memory_gb": peak_memory_gb(context.device),
            "best_metric": best.get("value"),
            "best_metric_name": context.config.checkpoint.metric_for_best_model,
            "best_step": best.get("step"),
            "ranking_metric": (ranking := context.objective.ranking_metric),
            "lower_is_better": context.objective.metric(ranking).lower_is_better,
            "skipped_steps": state.skipped_steps,
            "data_fingerprint": state.data_fingerprint,
        }
        if context.is_main_process:
            records.write_json(context.folder / "summary.json", context.summary)
        context.tell("on_train_end")
        return context.summary
