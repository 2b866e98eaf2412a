"""The loop: take a step, look around, log, evaluate, save, stop. Everything it calls lives in a room of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from treadle import trusted_code
from treadle.checkpoint.layout import steps_in
from treadle.checkpoint.lock import RunLock
from treadle.checkpoint.writer import clean
from treadle.data.dataset import Dataset
from treadle.data.loader import Loader, StepBatches
from treadle.distributed.base import Strategy
from treadle.distributed.choose import make_strategy, resolve_mode
from treadle.distributed.world import World
from treadle.errors import ConfigError, Diverged, PeerFailed, PeerLost, SaveError, Stopped, TreadleError
from treadle.evaluation.evaluator import Evaluator
from treadle.files import write_atomically
from treadle.models.base import Model
from treadle.models.catalogue import MODELS
from treadle.models.pretrained import pick_device
from treadle.monitor import records
from treadle.monitor.alerts import Alerts
from treadle.monitor.console import Console
from treadle.monitor.control import Control, Wishes
from treadle.monitor.health import Health
from treadle.monitor.profiler import Profiler
from treadle.monitor.settings import AlertSettings
from treadle.monitor.sinks import SINKS, Sink
from treadle.monitor.watchdog import Watchdog
from treadle.objectives.base import ModelWithObjective, Objective
from treadle.objectives.next_token import NextToken
from treadle.registry import nearest
from treadle.training import advice, checkup, guard, progress, resolve, snapshot, steering
from treadle.training.config import Recipe
from treadle.training.inspection import Inspection
from treadle.training.optim import Optimizers
from treadle.training.run_state import RunState
from treadle.training.saving import Saved, Saver
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
    "save" and "end", in every process (trainer.world.is_main_process tells the one that writes). Started by torchrun, or with an
    initialised process group, it trains as one of several processes.
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
        world: World | None = None,
    ) -> None:
        self.recipe = config or Recipe()
        self.world = world or World.open(self.recipe.parallel, self.recipe.run.device)
        main = self.world.is_main_process
        self.console = console or Console(quiet=True, silent=not main)
        self.device = pick_device(self.recipe.run.device, self.world.local_rank if self.world.size > 1 else None)
        self.parameter_count = model.parameter_count()
        self.model = model  # on the meta device when it is to be allocated in shards
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
        if not resume:
            self.world.on_main_first(self._refuse_used_folder)
        self.plan = resolve.schedule(self.recipe, dataset, self.world.size)
        self.precision = self.world.on_main_first(
            lambda: resolve.resolve_precision(self.recipe, self.model, self.device, self.console)
        )
        # What was resolved is what the run's config.toml says, and what a resumed run keeps.
        if MODELS.get(self.recipe.arch) is not type(model):
            self.recipe.arch = trusted_code.place_of(type(model)) or model.arch
        self.recipe.model = model.config.model_dump()
        self.recipe.train.precision = self.precision  # type: ignore[assignment]
        self.recipe.train.global_batch_size = self.plan.global_batch
        resolve.set_checkpointing(self.model, self.recipe.train.gradient_checkpointing)
        if self.recipe.train.torch_compile:
            resolve.compile_blocks(self.model)
        self.objective.prepare(self.model, self.device)
        module = ModelWithObjective(self.model, self.objective)
        self.strategy = self._spread(module)
        self.optimizers = Optimizers(self.model, self.recipe.optim, self.recipe.parallel.shard_optimizer
                                     and self.strategy.mode == "ddp")  # fmt: skip
        self.strategy.attach_optimizers(self.optimizers.inner)
        self.stepper = Stepper(
            module, self.optimizers, seed=self.recipe.run.seed, precision=self.precision,
            max_grad_norm=self.recipe.optim.max_grad_norm, loss_weights=self.recipe.train.loss_weights,
            strategy=self.strategy,
        )  # fmt: skip
        self.evaluator = Evaluator(self.model, self.tokenizer, self.precision, self.strategy)
        self.state = RunState(threads=torch.get_num_threads(), data_fingerprint=dataset.fingerprint())
        self.sinks: list[Sink] = []
        self.control = Control(self.folder if main else None, self.console.say, read_stdin=listen and main)
        self.alerts = Alerts(self.recipe.alerts if main else AlertSettings(), self.recipe.name, self.console.warn)
        self.health = Health(self.recipe.train.spike_sigmas)
        self.watchdog = Watchdog(self.recipe.train.step_timeout, self.folder, self.world.rank)
        self.inspection = Inspection(self.model, self.strategy) if self.recipe.log.health else None
        self.saver = Saver(self.recipe.checkpoint.asynchronous)
        self.last_row: dict[str, Any] = {}
        self.profiler = Profiler(self.recipe.log.profile, self.log_folder)
        self._save_failures = 0
        self.saved_step = -1
        self.window = Window(self.state)
        self._lock: RunLock | None = None
        self._opened = False
        self.saving_ended, self.wishes = False, Wishes()  # in all processes, as agreed by steering.obey

    def _refuse_used_folder(self) -> None:
        if steps_in(self.checkpoints) or (self.folder / "metrics.jsonl").exists():
            raise ConfigError(
                f"{self.folder} already holds a run; continue it with resume=True or use another output_dir"
            )

    def _spread(self, module: ModelWithObjective) -> Strategy:
        """The module over all processes, its weights allocated and on their device."""
        mode = resolve_mode(self.recipe.parallel, self.world, self.model.parameter_count(), self.device)
        on_meta = any(p.is_meta for p in self.model.parameters())
        if mode != "fsdp" and not on_meta:
            self.model.to(self.device)
        elif mode != "fsdp":
            self.model.materialise(self.recipe.run.seed, self.device)
        strategy = make_strategy(mode, module, self.model, self.world, self.recipe.parallel, precision=self.precision,
                                 accumulation=self.plan.accumulation, device=self.device,
                                 micro_batch=self.plan.micro_batch, max_grad_norm=self.recipe.optim.max_grad_norm)  # fmt: skip
        if mode == "fsdp" and on_meta:  # no process ever holds the whole model
            home = "cpu" if self.recipe.parallel.cpu_offload else self.device
            self.model.materialise(self.recipe.run.seed, home)
        return strategy

    def event(self, kind: str, **details: Any) -> None:
        """A line in the run's events.jsonl, from the first process."""
        if self.world.is_main_process:
            records.write_event(self.folder, kind, **details)

    # ---- the loop ----

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary. Raises Stopped after a signal, Diverged, SaveError."""
        self.open()
        try:
            with self.control, self.watchdog, self.world.watching():
                self._train()
                self._collect(self.saver.wait())
            return self.summary("finished")
        except BaseException as problem:
            self._ended_badly(problem)
            raise
        finally:
            self.close()

    def _ended_badly(self, problem: BaseException) -> None:
        """Leaves word: to the other processes, in summary.json, and to whoever gets alerts."""
        if not isinstance(problem, (PeerFailed, PeerLost, Stopped)):
            self.world.failed(problem)
        if isinstance(problem, TreadleError):
            status = {Stopped: "stopped", Diverged: "diverged"}.get(type(problem), "failed")
            self.summary(status, problem.exit_code)
            if not isinstance(problem, Stopped):
                self.alerts.send("stopped", f"stopped at step {self.state.step}: {type(problem).__name__}")

    def open(self) -> None:
        """Takes the run's lock and removes what an interrupted save left."""
        if not self._opened:
            self.world.on_main_first(lambda: self.adopt_lock(RunLock(self.folder)))
            self._opened = True

    def adopt_lock(self, lock: RunLock | None) -> None:
        """Takes over a lock that was acquired before the trainer was built; only the first process has one."""
        self._lock, self._opened = lock, True
        if lock is not None:
            clean(self.checkpoints)

    def close(self) -> None:
        self.saver.close()
        self.console.stop()
        for sink in self.sinks:
            sink.close()
        self.sinks = []
        self.alerts.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._opened = False

    def _train(self) -> None:
        self.world.on_main_first(self._write_start)
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
            for name in (self.recipe.log.report_to if self.world.is_main_process else ())
        ]  # fmt: skip

    def open_batches(self) -> None:
        offset, end = self.state.data_offset, self.plan.end
        order = self.dataset.order(self.recipe.run.seed, end + offset * self.plan.global_batch if end else None)
        self.batches = StepBatches(
            self.dataset, order, self.plan.global_batch, self.plan.accumulation, self.world.rank, self.world.size
        )

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
        if not self.strategy.engine_owns_step:
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
                rollback = self._after_step(result, rate, time.perf_counter() - begun, loader)
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
                      idle=lambda: steering.obey_alone(self))  # fmt: skip

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
        return fresh and (self._due(self.plan.eval_steps) or self.wishes.evaluate)

    def _look_around(self) -> bool:
        """Between steps: log, evaluate, save, obey. True when training ends here."""
        improved, ended = False, False
        stopping = steering.obey(self)
        if self.saving_ended:
            self._collect(self.saver.wait())
        if self._evaluation_due():
            improved, ended = checkup.evaluate(self)
            stopping = self.wishes.stop
        self.wishes.evaluate = False
        if self._due(self.plan.save_steps) or improved or ended or stopping or self.wishes.save:
            self.wishes.save = False
            last = stopping or ended or self.state.step == self.plan.max_steps
            self._save(must=last, best=improved)
        if stopping and self.state.step < self.plan.max_steps:
            raise self._stopped()
        return ended

    def _stopped(self) -> Stopped:
        """Everything that is said when a run stops on request, and the error that carries its exit code."""
        reason = self.control.stop_reason or ""
        self._collect(self.saver.wait())
        self.event("stopped", step=self.state.step, reason=reason)
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
        self, result: StepResult, rate: float, seconds: float, loader: Loader
    ) -> str:
        """Counts, judges and logs one step; returns why the run must roll back, or nothing."""
        state = self.state
        warmed_up = self._warmed_up
        state.step += 1
        state.tokens += result.counts["tokens"]
        state.seconds += seconds
        loader.computed += seconds
        rollback = ""
        if result.skipped:
            rollback = guard.skipped(self, result)
        else:
            state.consecutive_skips = 0
            self.window.add(result)
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
        self._collect(self.saver.wait())  # one save at a time
        self.saved_step = self.state.step
        self.saver.submit(self.state.step, snapshot.prepare(self, best))
        if must or not self.saver.asynchronous:
            self._collect(self.saver.wait(), must)

    def _collect(self, saved: Saved | None, must: bool = False) -> None:
        """Takes up how a save ended."""
        if saved is None:
            return
        if saved.problem is None:
            self._save_failures = 0
            self.event("saved", step=saved.step, best=self.state.best_step == saved.step)
            self.tell("save", {"step": saved.step})
            return
        if not isinstance(saved.problem, (SaveError, PeerFailed)):
            raise saved.problem
        self.saved_step = -1
        self._save_failures += 1
        self.event("save_failed", step=saved.step, reason=str(saved.problem))
        if must or self._save_failures >= SAVE_ATTEMPTS:
            raise saved.problem
        self.console.warn(f"{saved.problem} (attempt {self._save_failures} of {SAVE_ATTEMPTS}; training goes on)")

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
        self.log_folder.mkdir(parents=True, exist_ok=True)
        if self.state.step == 0 or not (self.folder / "tokenizer").is_dir():
            self.tokenizer.save(self.folder / "tokenizer")
        write_atomically(self.folder / "config.toml", self.recipe.to_toml())
        records.write_json(self.folder / "environment.json", records.environment())
        for name, table in self.strategy.files().items():
            records.write_json(self.folder / name, table)
        started = "resumed" if self.state.step else "started"
        self.event(started, step=self.state.step, precision=self.precision, plan=asdict(self.plan),
                   processes=self.world.size, parallel=self.strategy.mode)  # fmt: skip

    def summary(self, status: str, exit_code: int = 0) -> dict[str, Any]:
        """Writes and returns summary.json."""
        if status == "finished":
            self.event("finished", step=self.state.step)
            self.alerts.send("finished", f"finished at step {self.state.step}", step=self.state.step)
        state = self.state
        table = {
            "status": status,
            "exit_code": exit_code,
            "step": state.step,
            "max_steps": self.plan.max_steps,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "parameters": self.parameter_count,
            "architecture": self.model.arch,
            "precision": self.precision,
            "processes": self.world.size,
            "parallel": self.strategy.mode,
            "peak_memory_gb": progress.peak_memory_gb(self.device),
            "best_metric": state.best_metric,
            "best_metric_name": self.recipe.checkpoint.metric_for_best_model,
            "best_step": state.best_step,
            "skipped_steps": state.skipped_steps,
            "data_fingerprint": state.data_fingerprint,
        }
        if self.world.is_main_process:
            records.write_json(self.folder / "summary.json", table)
        self.tell("end", table)
        return table
