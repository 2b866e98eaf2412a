"""The loop: take a step, look around, log, evaluate, save, stop. Everything it calls lives in a room of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from treadle.checkpoint.layout import steps_in
from treadle.checkpoint.lock import RunLock
from treadle.checkpoint.writer import clean
from treadle.data.batch import IGNORE, Batch
from treadle.data.dataset import Dataset
from treadle.data.loader import Loader, StepBatches
from treadle.distributed.environment import refuse_many
from treadle.errors import ConfigError, SaveError, Stopped, TreadleError
from treadle.evaluation.evaluator import Evaluator
from treadle.files import write_atomically
from treadle.models.base import Model
from treadle.models.catalogue import MODELS
from treadle.models.pretrained import pick_device
from treadle.monitor import records
from treadle.monitor.alerts import Alerts
from treadle.monitor.console import Console
from treadle.monitor.control import Control
from treadle.monitor.health import Health
from treadle.monitor.profiler import Profiler
from treadle.monitor.sinks import SINKS, Sink
from treadle.monitor.watchdog import Watchdog
from treadle.objectives.base import Objective, Unit
from treadle.objectives.next_token import NextToken
from treadle.registry import nearest
from treadle.training import advice, checkup, guard, progress, resolve, snapshot, steering
from treadle.training.config import Recipe
from treadle.training.inspection import Inspection
from treadle.training.optim import Optimizers
from treadle.training.run_state import RunState
from treadle.training.schedule import learning_rate, warmup_steps
from treadle.training.step import Stepper, StepResult
from treadle.training.window import Window

SAVE_ATTEMPTS = 3
WAIT_STEPS, WAIT_SHARE, AUTO_WORKERS = 50, 0.1, 2  # num_workers = auto looks once, after this many steps

Callback = Callable[[str, "Trainer", dict[str, Any]], None]


class Trainer:
    """Trains one model on one dataset in one run folder.

    config: a Recipe, or None for defaults. A used folder is refused unless resume=True, which continues it from its
    newest valid checkpoint. callbacks are called as callback(event, trainer, row) with the events "log", "evaluate",
    "save" and "end".
    """

    def __init__(
        self,
        model: Model,
        dataset: Dataset,
        eval_dataset: Dataset | None = None,
        config: Recipe | None = None,
        objective: Objective | None = None,
        callbacks: Sequence[Callback] = (),
        *,
        resume: bool = False,
        console: Console | None = None,
        listen: bool = False,
    ) -> None:
        refuse_many()
        self.recipe = config or Recipe()
        self.console = console or Console(quiet=True)
        self.model = model.to(pick_device(self.recipe.run.device))
        self.dataset, self.eval_dataset = dataset, eval_dataset
        self.tokenizer = dataset.tokenizer
        if model.config.vocab_size < self.tokenizer.vocab_size:
            raise ConfigError(f"model.vocab_size = {model.config.vocab_size} is smaller than the tokenizer's "
                              f"{self.tokenizer.vocab_size}; leave it out or make it larger")  # fmt: skip
        self.objective = objective or NextToken()
        self.callbacks = list(callbacks)
        self.folder = self.recipe.folder
        self.checkpoints = Path(self.recipe.checkpoint.checkpoint_dir or self.folder / "checkpoints")
        self.log_folder = Path(self.recipe.log.log_dir or self.folder)
        if not resume and (steps_in(self.checkpoints) or (self.folder / "metrics.jsonl").exists()):
            raise ConfigError(
                f"{self.folder} already holds a run; continue it with resume=True or use another output_dir"
            )
        self.plan = resolve.schedule(self.recipe, dataset)
        self.precision = resolve.resolve_precision(self.recipe, self.model, self.console)
        # What was resolved is what the run's config.toml says, and what a resumed run keeps.
        if MODELS.get(self.recipe.arch) is not type(model):
            self.recipe.arch = model.arch
        self.recipe.model = model.config.model_dump()
        self.recipe.train.precision = self.precision  # type: ignore[assignment]
        self.recipe.train.global_batch_size = self.plan.global_batch
        resolve.set_checkpointing(self.model, self.recipe.train.gradient_checkpointing)
        if self.recipe.train.torch_compile:
            resolve.compile_blocks(self.model)
        self.optimizers = Optimizers(self.model, self.recipe.optim)
        self.stepper = Stepper(
            Unit(self.model, self.objective), self.optimizers, seed=self.recipe.run.seed, precision=self.precision,
            max_grad_norm=self.recipe.optim.max_grad_norm, loss_weights=self.recipe.train.loss_weights,
        )  # fmt: skip
        self.evaluator = Evaluator(self.model, self.tokenizer, self.precision)
        self.state = RunState(threads=torch.get_num_threads(), data_fingerprint=dataset.fingerprint())
        self.sinks: list[Sink] = []
        self.control = Control(self.folder, self.console.say, read_stdin=listen)
        self.alerts = Alerts(self.recipe.alerts, self.recipe.name, self.console.warn)
        self.health = Health(self.recipe.train.spike_sigmas)
        self.watchdog = Watchdog(self.recipe.train.step_timeout, self.folder)
        self.inspection = Inspection(self.model) if self.recipe.log.health else None
        self.last_row: dict[str, Any] = {}
        self.profiler = Profiler(self.recipe.log.profile, self.log_folder)
        self._byte_lengths = torch.as_tensor(self.tokenizer.byte_lengths, dtype=torch.int64)
        self._save_failures = 0
        self.saved_step = -1
        self.window = Window(self.state)
        self._lock: RunLock | None = None

    # ---- the loop ----

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary. Raises Stopped after a signal, Diverged, SaveError."""
        self.open()
        try:
            with self.control, self.watchdog:
                self._train()
            return self.summary("finished")
        except TreadleError as problem:
            if not isinstance(problem, Stopped):
                self.alerts.send("stopped", f"stopped at step {self.state.step}: {type(problem).__name__}")
            raise
        finally:
            self.close()

    def open(self) -> None:
        """Takes the run's lock and removes what an interrupted save left."""
        if self._lock is None:
            self._lock = RunLock(self.folder)
            clean(self.checkpoints)

    def adopt_lock(self, lock: RunLock) -> None:
        """Takes over a lock that was acquired before the trainer was built."""
        self._lock = lock
        clean(self.checkpoints)

    def close(self) -> None:
        self.console.stop()
        for sink in self.sinks:
            sink.close()
        self.sinks = []
        self.alerts.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _train(self) -> None:
        self.log_folder.mkdir(parents=True, exist_ok=True)
        self._write_start()
        if self.finished:
            return
        self.state.ended = ""
        self.open_sinks()
        begun = "resumed" if self.state.step else "started"
        self.alerts.send("start", f"{begun} at step {self.state.step} of {self.plan.max_steps}", step=self.state.step)
        if self._evaluation_due():
            checkup.evaluate(self)  # the last start was stopped between this step and its evaluation
        self.open_batches()
        with advice.on_out_of_memory(self):
            if self.state.step == 0:
                self._mock_step()
            self.console.start(self.state.step, self.plan.max_steps)
            self._loop()

    def open_sinks(self) -> None:
        """Opens the sinks, each without rows after the current step."""
        for sink in self.sinks:
            sink.close()
        self.sinks = [
            SINKS.get(name)(self.log_folder, self.state.step, self.recipe.name, self.recipe.log.project,
                            self.recipe.tables())
            for name in self.recipe.log.report_to
        ]  # fmt: skip

    def open_batches(self) -> None:
        offset, end = self.state.data_offset, self.plan.end
        order = self.dataset.order(self.recipe.run.seed, end + offset * self.plan.global_batch if end else None)
        self.batches = StepBatches(self.dataset, order, self.plan.global_batch, self.plan.accumulation)

    def _mock_step(self) -> None:
        """One step that changes nothing: memory and shape errors come before the first real one."""
        try:
            result = self.stepper.run(0, self.batches[0], 0.0, update=False)
        except Exception as problem:
            if (
                not self.recipe.train.torch_compile
                or isinstance(problem, TreadleError)
                or advice.is_out_of_memory(problem)
            ):
                raise
            raise ConfigError(f"torch.compile does not work here ({type(problem).__name__}: {str(problem)[:200]}); leave "
                              "out --torch_compile") from problem  # fmt: skip
        unknown = sorted(set(self.recipe.train.loss_weights) - set(result.losses))
        if unknown:
            raise ConfigError(
                f"loss_weights.{unknown[0]}: {nearest(unknown[0], list(result.losses))} (the parts of this model's loss)"
            )
        self.optimizers.zero_grad()

    def _loop(self) -> None:
        loader = self._loader(self.recipe.data.num_workers)
        try:
            iterator = iter(loader)
            while self.state.step < self.plan.max_steps:
                step, found = self.state.step, next(iterator, None)
                if found is None:  # a stop was asked for while the step waited for data
                    self._look_around()
                    return
                micro_batches = found[1]
                self.profiler.before(step + 1)
                if self.inspection is not None:
                    self.inspection.on = self._log_due(step + 1)
                begun = time.perf_counter()
                rate = learning_rate(self.recipe.optim, step, self.plan.max_steps)
                self.watchdog.begin()
                result = self.stepper.run(step, micro_batches, rate, veto=self._veto)
                self.watchdog.end()
                rollback = self._after_step(result, micro_batches, rate, time.perf_counter() - begun, loader)
                self.profiler.after(step + 1)
                if rollback:
                    loader.close()
                    guard.roll_back(self, rollback)
                    loader = self._loader(loader.workers)
                    iterator = iter(loader)
                    continue
                if self._look_around():
                    return
                if self.recipe.data.num_workers == "auto" and loader.workers == 0:
                    loader, iterator = self._maybe_more_workers(loader, iterator)
        finally:
            loader.close()

    def _loader(self, workers: int | str) -> Loader:
        count = 0 if workers == "auto" else int(workers)
        offset = self.state.data_offset
        return Loader(self.batches, self.state.step + offset, self.plan.max_steps + offset, workers=count,
                      prefetch=self.recipe.data.prefetch_factor, pin=self.model.device.type == "cuda",
                      idle=lambda: steering.obey(self))  # fmt: skip

    def _maybe_more_workers(self, loader: Loader, iterator: Any) -> tuple[Loader, Any]:
        if self.state.step + self.state.data_offset - loader.start != WAIT_STEPS:
            return loader, iterator
        share = loader.wait_share()
        if share <= WAIT_SHARE:
            return loader, iterator
        self.console.say(f"waiting for data took {share:.0%} of the first {WAIT_STEPS} steps: {AUTO_WORKERS} data workers "
                         "from here on (--num_workers chooses)")  # fmt: skip
        loader.close()
        busier = self._loader(AUTO_WORKERS)
        return busier, iter(busier)

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.plan.max_steps

    def _evaluation_due(self) -> bool:
        fresh = self.eval_dataset is not None and self.state.step > self.state.evaluated_step
        return fresh and (self._due(self.plan.eval_steps) or self.control.eval_requested)

    def _look_around(self) -> bool:
        """Between steps: log, evaluate, save, obey. True when training ends here."""
        improved, ended = False, False
        steering.obey(self)
        if self._evaluation_due():
            improved, ended = checkup.evaluate(self)
        self.control.eval_requested = False
        stopping = self.control.should_stop()
        if self._due(self.plan.save_steps) or improved or ended or stopping or self.control.save_requested:
            self.control.save_requested = False
            last = stopping or ended or self.state.step == self.plan.max_steps
            self._save(must=last, best=improved)
        if stopping and self.state.step < self.plan.max_steps:
            raise self._stopped()
        return ended

    def _stopped(self) -> Stopped:
        """Everything that is said when a run stops on request, and the error that carries its exit code."""
        reason = self.control.stop_reason or ""
        self.summary("stopped")
        records.write_event(self.folder, "stopped", step=self.state.step, reason=reason)
        self.alerts.send("stopped", f"stopped by {reason} after step {self.state.step}; saved", step=self.state.step)
        self.console.stop()
        self.console.say(f"Stopped by {reason} after step {self.state.step}; saved. The same command continues.")
        stop = Stopped(f"stopped by {reason}")
        stop.exit_code = self.control.exit_code
        return stop

    # ---- after a step ----

    @property
    def _warmed_up(self) -> bool:
        return self.state.step >= warmup_steps(self.recipe.optim, self.plan.max_steps)

    def _veto(self, loss: float) -> bool:
        return self.recipe.train.on_spike == "skip" and self.health.is_spike(loss, self._warmed_up)

    def _after_step(
        self, result: StepResult, micro_batches: list[Batch], rate: float, seconds: float, loader: Loader
    ) -> str:
        """Counts, judges and logs one step; returns why the run must roll back, or nothing."""
        state = self.state
        warmed_up = self._warmed_up
        state.step += 1
        state.tokens += result.counts["tokens"]
        state.seconds += seconds
        loader.computed += seconds
        scored = sum(int(self._byte_lengths[b.labels[b.labels != IGNORE]].sum()) for b in micro_batches
                     if b.labels is not None)  # fmt: skip
        rollback = ""
        if result.skipped:
            rollback = guard.skipped(self, result)
        else:
            state.consecutive_skips = 0
            self.window.add(result, scored)
        findings = self.health.observe(
            state.step, result.loss, result.grad_norm, seconds, result.counts["tokens"], warmed_up
        )
        rollback = guard.report(self, findings) or rollback
        self.window.step_seconds += seconds
        self.window.step_tokens += result.counts["tokens"]
        self.window.steps += 1
        self.console.step(state.step)
        if self._log_due(state.step):
            progress.log_row(self, result, rate, loader)
        every = self.recipe.alerts.alert_steps
        if every and state.step % every == 0:
            self.alerts.send(
                "step", f"step {state.step} of {self.plan.max_steps}: loss {result.loss:.4f}", step=state.step
            )
        return rollback

    def _log_due(self, step: int) -> bool:
        return step == 1 or step == self.plan.max_steps or step % self.recipe.log.logging_steps == 0

    def tell(self, event: str, row: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback(event, self, row)

    # ---- evaluation and saving ----

    def evaluate(self) -> dict[str, float]:
        """Metrics over the whole evaluation data."""
        if self.eval_dataset is None:
            raise ConfigError("there is no evaluation data; give validation_path or a validation_fraction above 0")
        metrics = self.evaluator.evaluate(self.eval_dataset, self.eval_batch())
        assert metrics is not None
        return metrics

    def eval_batch(self) -> int:
        return self.recipe.eval.per_device_eval_batch_size or self.plan.micro_batch

    @property
    def finished(self) -> bool:
        """All steps are done, or training ended early and is still asked to end early."""
        wanted = self.recipe.eval
        still = wanted.early_stopping_patience is not None or wanted.target_loss is not None
        return self.state.step >= self.plan.max_steps or bool(self.state.ended and still)

    def _save(self, must: bool, best: bool) -> None:
        if self.saved_step == self.state.step and not best:
            return
        try:
            snapshot.save(self, best)
        except SaveError as problem:
            self._save_failures += 1
            records.write_event(self.folder, "save_failed", step=self.state.step, reason=str(problem))
            if must or self._save_failures >= SAVE_ATTEMPTS:
                raise
            self.console.warn(f"{problem} (attempt {self._save_failures} of {SAVE_ATTEMPTS}; training goes on)")
            return
        self._save_failures, self.saved_step = 0, self.state.step
        self.tell("save", {"step": self.state.step})

    def save_checkpoint(self, name: str | Path) -> Path:
        """Writes a checkpoint where `name` says (relative paths from here); it is never rotated away."""
        return Path(snapshot.save_to(self, Path(name)))

    def load_checkpoint(self, name: str | Path) -> None:
        """Goes on from a checkpoint folder: weights, optimiser, counters."""
        from treadle.checkpoint.reader import Checkpoint

        snapshot.restore(self, Checkpoint(name))

    def restored(self) -> None:
        """Takes up what the restored state carries."""
        self.window = Window(self.state)
        self.health = Health(self.recipe.train.spike_sigmas, **self.state.health)
        for key, value in self.state.settings.items():
            steering.change(self, key, value)

    # ---- the run's own files ----

    def _write_start(self) -> None:
        """On disk before the first step, so that a kill at any time can be continued."""
        if self.state.step == 0 or not (self.folder / "tokenizer").is_dir():
            self.tokenizer.save(self.folder / "tokenizer")
        write_atomically(self.folder / "config.toml", self.recipe.to_toml())
        records.write_json(self.folder / "environment.json", records.environment())
        started = "resumed" if self.state.step else "started"
        records.write_event(
            self.folder, started, step=self.state.step, precision=self.precision, plan=asdict(self.plan)
        )

    def summary(self, status: str) -> dict[str, Any]:
        """Writes and returns summary.json."""
        if status == "finished":
            records.write_event(self.folder, "finished", step=self.state.step)
            self.alerts.send("finished", f"finished at step {self.state.step}", step=self.state.step)
        state = self.state
        table = {
            "status": status,
            "step": state.step,
            "max_steps": self.plan.max_steps,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "parameters": self.model.parameter_count(),
            "architecture": self.model.arch,
            "precision": self.precision,
            "best_metric": state.best_metric,
            "best_metric_name": self.recipe.checkpoint.metric_for_best_model,
            "best_step": state.best_step,
            "skipped_steps": state.skipped_steps,
            "data_fingerprint": state.data_fingerprint,
        }
        records.write_json(self.folder / "summary.json", table)
        self.tell("end", table)
        return table
