"""Changes nothing by itself: what a callback may see of a training, and the ways in which it may ask for something."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from treadle import terminal
from treadle.data.base import BatchPlan, Dataset, Position
from treadle.distributed.base import Strategy
from treadle.distributed.world import World
from treadle.models.base import Model
from treadle.monitor import records
from treadle.monitor.console import Console
from treadle.monitor.control import STOP_COMMAND_CODE
from treadle.objectives.base import Objective
from treadle.ops.precision import autocast
from treadle.training.config import Recipe
from treadle.training.requests import END, Kind, Requests
from treadle.training.resolve import Schedule, schedule
from treadle.training.run_state import RunState
from treadle.training.step import StepResult


@dataclass
class Context:
    """One training as its callbacks see it. All of it is for reading; what a callback wants done it asks for.

    config: the resolved configuration. model: the weights as they are (under FSDP this process's shards; with_full_weights
    gives whole ones). dataset, eval_dataset: what is trained and evaluated on. state: what the run remembers. plan: batch
    sizes, steps and intervals as resolved now (`set` may change them).
    """

    config: Recipe
    model: Model
    objective: Objective
    dataset: Dataset
    eval_dataset: Dataset | None
    world: World
    strategy: Strategy
    device: torch.device
    precision: str
    console: Console
    plan: Schedule
    state: RunState
    batch_plan: BatchPlan  # how this process shares in the batches
    listen: bool = False  # words typed into the terminal count
    requests: Requests = field(default_factory=Requests)

    # What the loop keeps current.
    result: StepResult | None = None  # of the last step
    learning_rate: float = 0.0  # of the last step
    step_seconds: float = 0.0  # of the last step, waiting for data not counted
    pauses: dict[str, float] = field(default_factory=dict)  # seconds of the last evaluation and save between two steps (training/remaining.py)
    warmed_up: bool = False  # the step's learning rate is past its linear rise
    data_wait: float = 0.0  # seconds that steps have waited for data since this start
    data_wait_share: float = 0.0  # the same as a share of the time
    computed: float = 0.0  # seconds of steps since the data was opened
    row: dict[str, Any] = field(default_factory=dict)  # the last row of the log
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluation_row: dict[str, Any] = field(default_factory=dict)  # the same with the step and the model's own numbers
    saved_step: int = -1  # of the last checkpoint
    stop_reason: str = ""  # why a training stops before its last step
    summary: dict[str, Any] = field(default_factory=dict)  # at the end

    # How the loop hears; set by it.
    tell: Callable[..., Any] = lambda hook, *arguments: None  # calls a hook of all callbacks
    states: Callable[[], dict[str, dict[str, Any]]] = dict  # what each callback remembers, by name
    best: dict[str, float] | None = None  # the next checkpoint is the best so far, by these metrics
    remark: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None
    began: Callable[[], None] = lambda: None  # before the first step, in the first process
    caller: str = ""  # the callback whose hook is running
    step_positions: list[Position] = field(default_factory=list)  # where each global batch of the last step began

    # ---- reading ----

    @property
    def folder(self) -> Path:
        """The run."""
        return self.config.folder

    @property
    def log_folder(self) -> Path:
        """Where metrics and traces go."""
        return self.config.log_folder

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints go."""
        return self.config.checkpoint_folder

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    @property
    def is_main_process(self) -> bool:
        """This process writes files and prints."""
        return self.world.is_main_process

    def due(self, every: int) -> bool:
        """The step is a multiple of `every`, or the last one."""
        return self.step % every == 0 or self.step == self.plan.max_steps

    def rows_of_step(self) -> list[Any]:
        """Names of this process's rows in the last step."""
        left, found = self.plan.rows_left(self.step - 1), []
        for before, position in enumerate(self.step_positions):
            rows = None if left is None else left - before * self.plan.global_batch
            found += self.dataset.rows_of(position, replace(self.batch_plan, rows=rows))
        return found

    def columns(self) -> dict[str, Any]:
        """What all callbacks add to a row of the log."""
        found: dict[str, Any] = {}
        for more in self.tell("columns"):
            found.update(more or {})
        return found

    @property
    def full_weights_need_all_ranks(self) -> bool:
        """with_full_weights has to be called by all processes at the same moment, or by none."""
        return self.strategy.full_weights_need_all_ranks

    def with_full_weights(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """work(model, *arguments) on whole weights."""
        # Gathered weights come in the type that products are computed in.
        precision = "fp32" if self.strategy.mode in ("none", "ddp") else self.precision

        def inside(model: Model, *rest: Any) -> Any:
            with autocast(precision, self.device):
                return work(model, *rest)

        return self.strategy.with_full_weights(inside, *arguments)

    def best_so_far(self) -> dict[str, Any]:
        """The value and the step of the best evaluation, as the callback best_model knows them."""
        return self.states().get("best_model", {})

    # ---- asking ----

    def request(self, kind: Kind, reason: str, exit_code: int = STOP_COMMAND_CODE) -> None:
        """Asks the loop for a "save", an "evaluate", a "rollback" (to the newest checkpoint, skipping the rows since) or a
        "stop" after this step. All processes carry it out, whichever asked. A stop with exit_code 0 is an end of training:
        the run is finished; any other can be continued by the same command."""
        self.requests.ask(kind, reason, exit_code, self.caller)

    def end(self, reason: str) -> None:
        """Training is finished after this step, before max_steps."""
        self.request("stop", reason, END)

    def set(self, key: str, value: Any) -> tuple[str, Any]:
        """Changes a key of the configuration from the next step on, in all processes; returns its full name and the value
        as fitted. ConfigError for a key that means nothing between two steps, or a value that does not fit."""
        full, fitted = self.config.fit_while_training(key, value)
        self.requests.settings[full] = fitted
        return full, fitted

    def mark_best(self, metrics: Mapping[str, float]) -> None:
        """The checkpoint of this step will be marked as the best so far (ask for a save as well)."""
        self.best = dict(metrics)

    def restore_best(self, step: int, metrics: Mapping[str, float]) -> None:
        """The best checkpoint so far is that of `step`; marks it again where the mark says otherwise."""
        self.remark(step, metrics)

    def apply(self, settings: dict[str, Any]) -> None:
        """Changes keys that were set and agreed; the loop calls it."""
        for key, value in settings.items():
            section, _, name = key.partition(".")
            setattr(self.config.section(section), name, value)
            self.state.settings[key] = value
        if settings:
            self.plan = schedule(self.config, self.dataset, self.world.size)

    # ---- saying ----

    def emit(self, event: str, **details: Any) -> None:
        """A line in the run's events.jsonl, from the first process."""
        if self.world.is_main_process:
            records.write_event(self.folder, event, **details)

    def say(self, text: str) -> None:
        """A message for people, on the main process."""
        self.console.say(text)

    def warn(self, text: str) -> None:
        """A warning for people, on the main process."""
        self.console.warn(text)

    def tell_of_data(self, text: str) -> None:
        """What reading came upon: on the console and in events.jsonl; from a process that has neither, on stderr."""
        self.warn(text)
        self.emit("data", text=text)
        if not self.world.is_main_process:
            terminal.write(f"[process {self.world.rank}] {text}", sys.stderr)

    def alert(self, event: str, text: str, **details: Any) -> None:
        """A message to whoever gets alerts (and to every callback's on_alert)."""
        self.tell("on_alert", event, text, details)
