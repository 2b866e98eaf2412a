"""Changes nothing; what is noticed beside the training: stopping times that are far off, and what the search finds."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from treadle.collatz.arithmetic import Map, delay, number, spelled
from treadle.collatz_tasks.numbers import exact_number
from treadle.training.callbacks.base import Callback
from treadle.training.context import Context

MEMORY = 0.999  # of the running mean and deviation of errors: about a thousand rows of the log
LEAK_STEPS = 2.0  # a mean error below this is no prediction: the honest one at 2^68 is above a hundred steps


class Anomalies(Callback):
    """Stopping times whose error lies far outside the running distribution, each with its exact number, and signs of a leak.

    The errors of a logged step are read after it; the mean and the deviation are exponential averages over such steps.
    """

    name = "collatz_anomalies"

    def __init__(self) -> None:
        self.load_state_dict({})

    def before_step(self, context: Context) -> None:
        self._watched(context).clear()

    @staticmethod
    def _watched(context: Context) -> Any:
        return getattr(context.objective, "watched", [])

    def on_log(self, context: Context) -> None:
        rows = list(self._watched(context))
        if not rows or context.result is None or context.result.skipped:
            return
        errors, low, high = (torch.cat(parts).cpu() for parts in zip(*rows))
        self._judge(context, errors.double(), low, high)
        self._learn(errors.double())

    def _judge(self, context: Context, errors: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
        task = context.config.task
        if context.step < task.get("anomaly_warmup", 0) or self.seen < 2 or self.deviation <= 0:
            return
        scores = (errors - self.mean) / self.deviation
        worst = int(scores.abs().argmax())
        if abs(float(scores[worst])) < task.get("anomaly_deviations", math.inf):
            return
        n = exact_number(low[worst], high[worst])
        text = (f"the stopping time of {n} ({delay(n)} steps) was predicted {float(scores[worst]):+.1f} deviations off "
                f"(error {float(errors[worst]):+.3f} in log(1 + steps))")  # fmt: skip
        context.emit("anomaly", step=context.step, number=str(n), deviations=float(scores[worst]))
        context.warn(text)
        context.alert("anomaly", text, step=context.step, number=str(n), deviations=float(scores[worst]))

    def _learn(self, errors: torch.Tensor) -> None:
        """Exponential averages of the mean and the mean square, the first ones unweighted."""
        self.seen += 1
        share = max(1 - MEMORY, 1 / self.seen)
        self.mean += share * (float(errors.mean()) - self.mean)
        self.square += share * (float(errors.square().mean()) - self.square)

    @property
    def deviation(self) -> float:
        return math.sqrt(max(0.0, self.square - self.mean**2))

    def on_evaluate(self, context: Context) -> None:
        """Better than anyone can be means that the answer was in the input."""
        metrics, found = context.metrics, []
        for name, value in metrics.items():
            kind = name.removeprefix("next_step_")
            lowest = metrics.get(f"floor_{kind}")
            # .02 nats: three deviations of the mean over a few hundred rows
            if name != kind and lowest is not None and value < lowest - 0.02:
                found.append(f"the next step of {kind} numbers costs {value:.4f} nats, below the floor of {lowest:.4f}")
        if metrics.get("stopping_error", math.inf) < LEAK_STEPS:
            found.append(f"stopping times are predicted to {metrics['stopping_error']:.2f} steps")
        for text in found:
            context.emit("leak", step=context.step, text=text)
            context.warn(f"{text}: that is no prediction, the input holds the answer")
            context.alert("anomaly", f"leak: {text}", step=context.step)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.mean, self.square = int(state.get("seen", 0)), float(state.get("mean", 0.0)), float(state.get("square", 0.0))


class SearchBeside(Callback):
    """A search for cycles, and for numbers that do not come down, in a process of low priority beside the training
    (--collatz.search 2^68): its own log in the run folder, stopped and gone on with together with the run."""

    name = "collatz_search"
    seconds = 2.0  # between two looks at the log

    def __init__(self) -> None:
        self.search: Any = None
        self.looked = 0.0
        self.ended = False

    def wanted(self, context: Context) -> bool:
        return context.is_main_process and bool(context.config.task.get("search"))

    def on_train_start(self, context: Context) -> None:
        from treadle.collatz.search import BackgroundSearch

        task = context.config.task
        self.search = BackgroundSearch(number(task["search"]), context.folder / "search.jsonl", Map.parse(task["search_map"]), task["search_workers"])
        self.search.start()
        context.say(f"searching {task['search_map']} from {spelled(number(task['search']))} beside the training: {context.folder / 'search.jsonl'}")

    def after_step(self, context: Context) -> None:
        if time.monotonic() - self.looked >= self.seconds:
            self.looked = time.monotonic()
            self._look(context)

    def _look(self, context: Context) -> None:
        for found in self.search.poll():
            details = found.as_dict()
            context.emit("discovery", step=context.step, discovery=details)
            context.warn(f"discovery: {details['text']}")
            context.alert("discovery", f"discovery: {details['text']}", step=context.step, number=details["number"])
        if not self.ended and (problem := self.search.problem()):
            self.ended = True
            context.warn(f"the search beside the training has ended: {problem}; training goes on")
            context.emit("search_ended", step=context.step, text=problem)

    def on_train_end(self, context: Context) -> None:
        if self.search is not None:
            self.search.stop()
            self._look(context)
            context.say(f"the search has reached {spelled(self.search.reached)} and goes on with the run")

    def close(self) -> None:
        if self.search is not None:
            self.search.stop()
