"""Changes the weights, step by step: the loop. What happens around it is in callbacks/, which ask it for what they need."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle.checkpoint.reader import Checkpoint
from treadle.data.base import BatchPlan, Dataset, Position
from treadle.data.batch import Batch
from treadle.distributed.world import World
from treadle.errors import ConfigError
from treadle.evaluation.evaluator import Evaluator
from treadle.models.base import Model
from treadle.models.pretrained import pick_device
from treadle.monitor.console import Console
from treadle.objectives.base import Losses, Objective
from treadle.objectives.next_token import NextToken
from treadle.objectives.overridden import with_overrides
from treadle.training import compiling, resolve
from treadle.training.advice import on_out_of_memory
from treadle.training.assembly import assemble
from treadle.training.callbacks.base import Callbacks, make_callbacks
from treadle.training.checkpoints import Checkpoints
from treadle.training.config import Recipe
from treadle.training.context import Context
from treadle.training.feeding import Feed
from treadle.training.mock_step import mock_step
from treadle.training.requests import END
from treadle.training.run_files import RunFolder, refuse_used
from treadle.training.run_state import RunState
from treadle.training.schedule import learning_rate, warmup_steps


class Trainer:
    """Trains one model on one dataset in one run folder.

    config: a TrainConfig, or None for defaults. A used folder is refused unless resume=True: then train() goes on from its
    newest valid checkpoint, or from the one that load_checkpoint was given. objective: what is learned; the next token
    without one. callbacks: treadle.Callback instances beside the built-in ones. Started by torchrun, or with an initialised
    process group, it trains as one of several processes, unless distributed=False: then that is an error.
    """

    def __init__(
        self, model: Model, dataset: Dataset, eval_dataset: Dataset | None = None, config: Recipe | None = None,
        objective: Objective | None = None, callbacks: Sequence[Any] = (), *, resume: bool = False,
        console: Console | None = None, listen: bool = False, world: World | None = None, distributed: bool | None = None,
    ) -> None:  # fmt: skip
        self.recipe = recipe = config or Recipe()
        self.world = world = world or World.open(recipe.parallel, recipe.run.device, distributed)
        self.console = console or Console(quiet=True, silent=not world.is_main_process)
        self.device = pick_device(recipe.run.device, world.local_rank if world.size > 1 else None)
        self.model, self.dataset, self.eval_dataset = model, dataset, eval_dataset
        self._given_objective = objective = objective or NextToken()
        self._goes_on = resume  # from the newest checkpoint, unless another one is loaded
        if not resume:
            world.on_main_first(lambda: refuse_used(recipe))
        parameter_count = model.parameter_count()  # before weights are in shards
        plan = resolve.schedule(recipe, dataset, world.size)
        if type(self).compute_metrics is Trainer.compute_metrics:
            resolve.check_metrics(recipe, objective, model, eval_dataset)
        self.precision = precision = resolve.settle(recipe, plan, model, dataset, objective, self.device, world, self.console)
        objective.prepare(model, dataset, self.device)
        self.objective = with_overrides(objective, self, Trainer)
        self.assembly = assemble(model, self.objective, recipe, plan, world, self.device, precision)
        self.evaluator = Evaluator(model, None, precision, self.assembly.strategy, self.objective)
        share = BatchPlan(recipe.run.seed, plan.global_batch, plan.accumulation, world.rank, world.size)
        compiling.settle(recipe, plan, self.assembly, dataset, share, world, self.console)
        state = RunState(0, dataset.start, threads=torch.get_num_threads(), data_fingerprint=dataset.fingerprint())
        self.context = context = Context(
            recipe, model, self.objective, dataset, eval_dataset, world, self.assembly.strategy, self.device, precision,
            self.console, plan, state, share, listen,
        )  # fmt: skip
        self.requests, self.run_folder = context.requests, RunFolder(context, parameter_count)
        self.callbacks = Callbacks(make_callbacks([*objective.callbacks(), *callbacks], recipe.train), context)
        self.checkpoints, self.feed = Checkpoints(context, self.assembly), Feed(context, self.callbacks)

    state = property(lambda self: self.context.state)
    plan = property(lambda self: self.context.plan)

    # ---- what a subclass may override ----

    def compute_loss(self, model: Model, batch: Batch) -> Losses | Tensor:
        """The loss of one micro-batch: Losses, or a scalar, a mean over the batch's labels (its rows without labels)."""
        return self._given_objective(model, batch)

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What an evaluation added up (Objective.evaluation_sums) as metrics, "loss" among them."""
        return self._given_objective.compute_metrics(sums)

    # ---- training ----

    def train(self) -> dict[str, Any]:
        """Runs to the last step and returns the summary. Raises Stopped after a signal, Diverged, SaveError."""
        self.run_folder.open()
        try:
            with self.world.watching():
                if self._goes_on and (found := self.checkpoints.find_newest(copies_too=True)) is not None:
                    self.load_checkpoint(found)
                    resolve.check_data(self.state.data_fingerprint, self.dataset)
                self.world.on_main_first(self.run_folder.write_start)
                if not self.finished:
                    with on_out_of_memory(self.model, self.assembly.optimizers, self.recipe, self.plan):
                        self._train()
            summary = self.run_folder.summary("finished")
            self._agree()
            self.callbacks.raise_problem()
            return summary
        except BaseException as problem:
            self.run_folder.ended_badly(problem)
            raise
        finally:
            self.feed.close()
            self.checkpoints.close()
            self.console.stop()
            self.callbacks.close()
            self.run_folder.close()

    def _train(self) -> None:
        self.state.ended = self.state.ended_by = ""
        self.assembly.optimizers.use_average(False)
        self.callbacks.call("on_train_start")
        self._open_data()
        if self.state.step == 0:
            mock_step(self.dataset, self.feed.plan, self.assembly, self.recipe)
        self.console.start(self.state.step, self.plan.max_steps)
        while not self._between_steps():
            # None: a stop was asked for while the step waited for data, or there is no more.
            if (item := self.feed.next(self.state.step)) is not None:
                self.callbacks.call("before_step")
                self._step(*item)
                self.callbacks.call("after_step")
        self.assembly.optimizers.use_average(True)

    def _step(self, micro_batches: list[Batch], position: Position) -> None:
        """One optimiser step, and what the run remembers of it."""
        state, context, begun, cpu = self.state, self.context, time.perf_counter(), time.process_time()
        context.warmed_up = state.step >= warmup_steps(self.recipe.optim, self.plan.max_steps)
        context.learning_rate = learning_rate(self.recipe.optim, state.step, self.plan.max_steps)
        context.result = self.assembly.stepper.run(state.step, micro_batches, context.learning_rate, veto=self.callbacks.veto)
        context.step_seconds = time.perf_counter() - begun
        context.data_wait, context.data_wait_share, context.computed = self.feed.waits(context.step_seconds)
        context.step_positions, state.position = self.feed.begun_at, position
        state.advance(context.result.counts.get("tokens", 0), context.step_seconds, time.process_time() - cpu)

    def _between_steps(self) -> bool:
        """Carries out, in this order, what was asked for since the last step; true when training ends here."""
        requests, state = self.requests, self.state
        self._agree()
        if self._rolled_back():
            return False
        if requests.save_ended:
            self._collect()
        if requests.take("evaluate") is not None:
            with self.assembly.optimizers.averaged():
                self._evaluate()
            self._agree()  # its callbacks may have asked for a save, the end, or a way back
            if self._rolled_back():
                return False
        stopping = "stop" in requests and state.step < self.plan.max_steps
        last = stopping or state.step >= self.plan.max_steps
        if stopping and requests.exit_code == END:
            state.ended, state.ended_by = requests.reasons["stop"], requests.stopped_by
        if requests.take("save") is not None or last:
            self._save(must=last)
        if last:
            self._collect()
            self.checkpoints.settle()
            self._agree()  # what on_save says counts for all
            self.callbacks.raise_problem()
        if stopping and requests.exit_code != END:
            raise self.run_folder.stopped(requests.reasons["stop"], requests.exit_code)
        return last

    # ---- what the loop carries out ----

    def _evaluate(self) -> None:
        if (data := self.eval_dataset) is None:
            raise ConfigError("an evaluation was asked for, but there is no evaluation data: nothing was held out")
        metrics = self.evaluator.evaluate(data, self.plan.eval_batch, self.recipe.eval.eval_rows, self._stop_asked)
        if metrics is None:  # stopped on the way; the next start evaluates this step first
            return
        self.context.metrics = metrics
        self.context.evaluation_row = {"step": self.state.step, "split": "validation", **metrics, **self.evaluator.inspect(data)}
        self.callbacks.call("on_evaluate")

    def _save(self, must: bool) -> None:
        best, self.context.best = self.context.best, None
        if self.checkpoints.saved_step != self.state.step or best is not None:
            self._collect()  # one save at a time
            self.checkpoints.save(self.context, best)
            if must or not self.checkpoints.saver.asynchronous:
                self._collect(must)

    def _collect(self, must: bool = False) -> None:
        """Waits for the save in flight, if there is one; `must`: it may not fail."""
        if (saved := self.checkpoints.collect(must)) is not None:
            self.context.saved_step = saved.step
            self.callbacks.call("on_save")

    def _rolled_back(self) -> bool:
        """A rollback takes the place of all else: back to the last good checkpoint, past the rows that led here."""
        if (reason := self.requests.take("rollback")) is None:
            return False
        self.requests.drop("evaluate", "save")
        before = self.state
        self._collect()  # a save in flight may be the one to go back to
        self.load_checkpoint(found := self.checkpoints.to_go_back_to(before, reason))
        self.state.rollbacks, self.state.position = before.rollbacks + 1, before.position
        self.checkpoints.saved_step = found.step
        self.callbacks.call("on_rollback")
        self._open_data()
        return True

    def _open_data(self) -> None:
        self.feed.open(self.state.position, self.plan.batches_left(self.state.step), self.plan.rows_left(self.state.step))

    # ---- agreeing ----

    def _agree(self) -> None:
        """All processes learn what each of them was asked for, and change the keys that were set."""
        self.context.apply(self.requests.agree(self.world, self.checkpoints.saver.busy, self.checkpoints.saver.ended))

    def _stop_asked(self) -> bool:
        """Between two batches of an evaluation, in all processes."""
        self.callbacks.call("on_idle")
        self._agree()
        return "stop" in self.requests

    # ---- for users ----

    def evaluate(self) -> dict[str, float]:
        """Metrics over the whole evaluation data. ConfigError without any."""
        if self.eval_dataset is None:
            raise ConfigError("there is no evaluation data; give validation_path or a validation_fraction above 0")
        with self.assembly.optimizers.averaged():
            return self.evaluator.evaluate(self.eval_dataset, self.plan.eval_batch) or {}

    @property
    def finished(self) -> bool:
        """All steps are done, or a callback ended training early and is still there."""
        return self.state.step >= self.plan.max_steps or self.state.ended_by in self.callbacks.ending

    def save_checkpoint(self, name: str | Path) -> Path:
        """Writes a checkpoint where `name` says (relative paths from here); it is never rotated away."""
        return Path(self.checkpoints.save_to(Path(name), self.context))

    def load_checkpoint(self, checkpoint: str | Path | Checkpoint) -> None:
        """Goes on from a checkpoint (its folder): weights, optimiser, counters."""
        self._goes_on = False
        checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
        self.context.state = self.checkpoints.restore(checkpoint, threads=self.state.threads)
        self.context.apply(dict(self.state.settings))
        self.callbacks.load_state(self.state.callbacks)
        self.callbacks.call("on_restore")
