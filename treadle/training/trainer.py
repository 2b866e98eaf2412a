"""The loop: take a step, look around, log, evaluate, save, stop. Everything it calls lives in a room of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from treadle.checkpoint.layout import steps_in
from treadle.checkpoint.lock import RunLock
from treadle.checkpoint.retention import write_atomically
from treadle.checkpoint.writer import clean
from treadle.data.batch import IGNORE, Batch
from treadle.data.dataset import Dataset
from treadle.data.loader import Loader, StepBatches
from treadle.distributed.environment import refuse_many
from treadle.errors import ConfigError, Diverged, SaveError, Stopped, TreadleError
from treadle.evaluation.evaluator import LOWER_IS_BETTER, Evaluator
from treadle.models.base import Model
from treadle.models.catalogue import MODELS
from treadle.models.pretrained import pick_device
from treadle.monitor import records
from treadle.monitor.console import Console
from treadle.monitor.control import Control
from treadle.monitor.profiler import Profiler
from treadle.monitor.sinks import SINKS, Sink
from treadle.objectives.base import Objective, Unit
from treadle.objectives.next_token import NextToken
from treadle.ops.memory import resident_bytes
from treadle.ops.peak import peak_flops
from treadle.registry import nearest
from treadle.training import advice, resolve, snapshot
from treadle.training.config import Recipe
from treadle.training.optim import Optimizers
from treadle.training.run_state import RunState
from treadle.training.schedule import learning_rate
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
        self.control = Control()
        self.profiler = Profiler(self.recipe.log.profile, self.log_folder)
        self._byte_lengths = torch.as_tensor(self.tokenizer.byte_lengths, dtype=torch.int64)
        self._save_failures = 0
        self._saved_step = -1
        self._window = Window(self.state)
        self._lock: RunLock | None = None

    # ---- the loop ----

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary. Raises Stopped after a signal, Diverged, SaveError."""
        self.open()
        try:
            with self.control:
                self._train()
        finally:
            self.close()
        return self.summary("finished")

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
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _train(self) -> None:
        self.log_folder.mkdir(parents=True, exist_ok=True)
        self._write_start()
        if self.finished:
            return
        self.state.ended = ""
        self.sinks = [
            SINKS.get(name)(self.log_folder, self.state.step, self.recipe.name, self.recipe.log.project,
                            self.recipe.tables())
            for name in self.recipe.log.report_to
        ]  # fmt: skip
        if self.state.step > self.state.evaluated_step and self._evaluation_due():
            self._evaluate()  # the last start was stopped between this step and its evaluation
        order = self.dataset.order(self.recipe.run.seed, self.plan.end)
        self.batches = StepBatches(self.dataset, order, self.plan.global_batch, self.plan.accumulation)
        with advice.on_out_of_memory(self.recipe, self.plan):
            if self.state.step == 0:
                self._mock_step()
            self.console.start(self.state.step, self.plan.max_steps)
            self._loop()

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
                step, micro_batches = next(iterator)
                self.profiler.before(step + 1)
                begun = time.perf_counter()
                rate = learning_rate(self.recipe.optim, step, self.plan.max_steps)
                result = self.stepper.run(step, micro_batches, rate)
                self._after_step(result, micro_batches, rate, time.perf_counter() - begun, loader)
                self.profiler.after(step + 1)
                if self._look_around():
                    return
                if self.recipe.data.num_workers == "auto" and loader.workers == 0:
                    loader, iterator = self._maybe_more_workers(loader, iterator)
        finally:
            loader.close()

    def _loader(self, workers: int | str) -> Loader:
        count = 0 if workers == "auto" else int(workers)
        return Loader(self.batches, self.state.step, self.plan.max_steps, workers=count,
                      prefetch=self.recipe.data.prefetch_factor, pin=self.model.device.type == "cuda")  # fmt: skip

    def _maybe_more_workers(self, loader: Loader, iterator: Any) -> tuple[Loader, Any]:
        if self.state.step - loader.start != WAIT_STEPS:
            return loader, iterator
        share = loader.waited / max(1e-9, loader.waited + self._window.step_seconds)
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
        return self.eval_dataset is not None and self.state.step > 0 and self._due(self.plan.eval_steps)

    def _look_around(self) -> bool:
        """Between steps: log, evaluate, save, obey. True when training ends here."""
        improved, ended = False, False
        if self._evaluation_due():
            improved, ended = self._evaluate()
        stopping = self.control.should_stop()
        if self._due(self.plan.save_steps) or improved or ended or stopping or self.control.save_requested:
            self.control.save_requested = False
            last = stopping or ended or self.state.step == self.plan.max_steps
            self._save(must=last, best=improved)
        if stopping and self.state.step < self.plan.max_steps:
            self.summary("stopped")
            name = self.control.stop_signal.name if self.control.stop_signal else ""
            records.write_event(self.folder, "stopped", step=self.state.step, signal=name)
            self.console.stop()
            self.console.say(f"Stopped by {name} after step {self.state.step}; saved. The same command continues.")
            stop = Stopped(f"stopped by {name}")
            stop.exit_code = self.control.exit_code
            raise stop
        return ended

    # ---- after a step ----

    def _after_step(
        self, result: StepResult, micro_batches: list[Batch], rate: float, seconds: float, loader: Loader
    ) -> None:
        state = self.state
        state.step += 1
        state.tokens += result.counts["tokens"]
        state.seconds += seconds
        scored = sum(int(self._byte_lengths[b.labels[b.labels != IGNORE]].sum()) for b in micro_batches
                     if b.labels is not None)  # fmt: skip
        if result.skipped:
            self._skipped(result)
        else:
            state.consecutive_skips = 0
            self._window.add(result, scored)
        self._window.step_seconds += seconds
        self._window.step_tokens += result.counts["tokens"]
        self._window.steps += 1
        self.console.step(state.step)
        if state.step == 1 or self._due(self.recipe.log.logging_steps):
            self._log(result, rate, loader)

    def _skipped(self, result: StepResult) -> None:
        state = self.state
        state.skipped_steps += 1
        state.consecutive_skips += 1
        rows = self.batches.rows_of(state.step - 1)
        records.write_event(self.folder, "nonfinite", step=state.step, grad_norm=result.grad_norm, rows=rows[:64])
        self.console.warn(f"step {state.step}: loss or gradient is not finite; the step was skipped "
                          f"({state.skipped_steps} so far)")  # fmt: skip
        # fp16 overflows on purpose while its loss scale settles.
        settling = self.stepper.loss_scale is not None and self.stepper.loss_scale.scale > 1
        if state.consecutive_skips >= self.recipe.train.nonfinite_limit and not settling:
            self.summary("diverged")
            raise Diverged(
                f"{state.consecutive_skips} steps in a row were not finite (steps {state.step - state.consecutive_skips + 1} "
                f"to {state.step}); the weights of the last checkpoint are sound. Try a lower --learning_rate, more "
                "--warmup_steps, or --precision fp32"
            )

    def _log(self, result: StepResult, rate: float, loader: Loader) -> None:
        window, state = self._window, self.state
        means = window.means(self.objective.main)
        loss = means.pop(self.objective.main, math.nan)
        row: dict[str, Any] = {
            "step": state.step,
            "loss": loss,
            "bpb": window.bits_per_byte(),
            "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan,
            "learning_rate": rate,
            "grad_norm": result.grad_norm,
            "tokens": state.tokens,
            "epoch": state.step * self.plan.global_batch / len(self.dataset),
            "tokens_per_second": window.step_tokens / max(1e-9, window.step_seconds),
            "memory_gb": self._memory_gb(),
            "data_wait": loader.waited,
            "seconds": state.seconds,
            "skipped_steps": state.skipped_steps,
            **{f"loss_{name}": value for name, value in means.items()},
            **{name: float(value) for name, value in result.stats.items()},
        }
        remaining = (self.plan.max_steps - state.step) * window.step_seconds / max(1, window.steps)
        if row["bpb"] is None:
            del row["bpb"]
        peak = peak_flops(self.model.device)
        if peak is not None:
            row["mfu"] = self._step_flops() * window.steps / max(1e-9, window.step_seconds) / peak
        for sink in self.sinks:
            sink.train(row)
        self.console.row(row, self.plan.max_steps, remaining)
        self._tell("log", row)
        window.reset()

    def _step_flops(self) -> float:
        """Forward and backward (twice the forward) of one step, recomputation not counted (PaLM, appendix B)."""
        return 3.0 * self.model.flops(self.dataset.seq_len) * self.plan.global_batch

    def _memory_gb(self) -> float:
        if self.model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.model.device) / 1e9
        return resident_bytes() / 1e9

    def _tell(self, event: str, row: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback(event, self, row)

    # ---- evaluation and saving ----

    def evaluate(self) -> dict[str, float]:
        """Metrics over the whole evaluation data."""
        if self.eval_dataset is None:
            raise ConfigError("there is no evaluation data; give validation_path or a validation_fraction above 0")
        metrics = self.evaluator.evaluate(self.eval_dataset, self._eval_batch())
        assert metrics is not None
        return metrics

    def _eval_batch(self) -> int:
        return self.recipe.eval.per_device_eval_batch_size or self.plan.micro_batch

    def _evaluate(self) -> tuple[bool, bool]:
        """(a new best, training ends here)."""
        assert self.eval_dataset is not None
        metrics = self.evaluator.evaluate(
            self.eval_dataset, self._eval_batch(), self.recipe.eval.eval_rows, self.control.should_stop
        )
        if metrics is None:  # stopped on the way; the next start evaluates this step first
            return False, False
        state = self.state
        state.evaluated_step = state.step
        row = {"step": state.step, "split": "validation", **metrics}
        for sink in self.sinks:
            sink.evaluation(row)
        self.console.say(f"evaluation at step {state.step}: loss {metrics['loss']:.4f}  bpb {metrics['bpb']:.4f}  "
                         f"accuracy {metrics['accuracy']:.3f}")  # fmt: skip
        self._sample()
        self._tell("evaluate", row)
        name = self.recipe.checkpoint.metric_for_best_model
        sign = 1 if LOWER_IS_BETTER[name] else -1
        value = sign * metrics[name]
        improved = math.isfinite(value) and (state.best_metric is None or value < sign * state.best_metric)
        if improved:
            state.best_metric, state.best_step = metrics[name], state.step
        return improved, self._early_stop(metrics["loss"])

    def _early_stop(self, loss: float) -> bool:
        state, wanted = self.state, self.recipe.eval
        bar = math.inf if state.best_loss is None else state.best_loss - wanted.early_stopping_threshold
        if loss < bar:
            state.best_loss, state.stale_evaluations = loss, 0
        else:
            state.stale_evaluations += 1
        if wanted.target_loss is not None and loss <= wanted.target_loss:
            return self._end(f"target_loss {wanted.target_loss} is reached")
        patience = wanted.early_stopping_patience
        if patience is not None and state.stale_evaluations >= patience:
            return self._end(f"no better loss in {patience} evaluations")
        return False

    def _end(self, reason: str) -> bool:
        self.state.ended = reason
        self.console.say(f"{reason}; training ends")
        return True

    @property
    def finished(self) -> bool:
        """All steps are done, or training ended early and is still asked to end early."""
        wanted = self.recipe.eval
        still = wanted.early_stopping_patience is not None or wanted.target_loss is not None
        return self.state.step >= self.plan.max_steps or bool(self.state.ended and still)

    def _sample(self) -> None:
        if self.recipe.eval.sample_tokens == 0 or not self.model.capabilities.decodes:
            return
        from treadle.generation.decode import generate_text

        prompt = self.recipe.eval.sample_prompt or "\n"
        text = generate_text(self.model, self.tokenizer, prompt, self.recipe.eval.sample_tokens, seed=self.state.step,
                             temperature=0.8)  # fmt: skip
        folder = self.log_folder / "samples"
        folder.mkdir(exist_ok=True)
        (folder / f"step-{self.state.step:08d}.txt").write_text(self.recipe.eval.sample_prompt + text, encoding="utf-8")

    def _save(self, must: bool, best: bool) -> None:
        if self._saved_step == self.state.step and not best:
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
        self._save_failures, self._saved_step = 0, self.state.step
        self._tell("save", {"step": self.state.step})

    def save_checkpoint(self, name: str | Path) -> Path:
        """Writes a checkpoint where `name` says (relative paths from here); it is never rotated away."""
        return Path(snapshot.save_to(self, Path(name)))

    def load_checkpoint(self, name: str | Path) -> None:
        """Goes on from a checkpoint folder: weights, optimiser, counters."""
        from treadle.checkpoint.reader import Checkpoint

        snapshot.restore(self, Checkpoint(name))

    def window_state(self) -> dict[str, Any]:
        return self._window.to_json()

    def restore_window(self) -> None:
        self._window = Window(self.state)

    # ---- the run's own files ----

    def _write_start(self) -> None:
        """On disk before the first step, so that a kill at any time can be continued."""
        if not (self.folder / "tokenizer").is_dir():
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
        self._tell("end", table)
        return table
