"""The jobs of a suite and their order: weigh, try learning rates, train each seed, probe. What is finished is read, not run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle import trusted_code
from treadle.distributed.pool import Command, folder_name
from treadle.monitor.records import last_evaluation, write_json
from treadle.suite.design import EVALUATIONS, Variant, digest, probe_tables, whole, with_code, write_recipe
from treadle.suite.settings import Kind, Suite

WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
REQUEST, RESULT = "request.json", "measured.json"


@dataclass(eq=False)
class Job:
    """One process: a training (or a measurement) of a variant."""

    kind: Kind
    variant: Variant
    seed: int = 0
    learning_rate: float | None = None  # None of a final run: chosen by then
    probe: str = ""
    state: str = WAITING
    folder: Path | None = None
    cpu_seconds: float = 0.0
    values: dict[str, Any] | None = None  # the last evaluation, or what was measured
    summary: dict[str, Any] | None = None
    problem: str = ""
    reused: bool = False

    @property
    def label(self) -> str:
        words = {"search": f"learning rate {self.learning_rate:g}" if self.learning_rate else "", "run": f"seed {self.seed}",
                 "probe": self.probe, "measure": "step and decoding"}  # fmt: skip
        return f"{self.variant.label}, {words[self.kind]}"


class Jobs:
    """All jobs of a suite in `output`; `take` gives the next that nothing holds back."""

    def __init__(self, suite: Suite, variants: list[Variant], output: Path) -> None:
        self.suite, self.variants, self.output = suite, variants, output
        settings = suite.settings
        first: list[Job] = []
        if settings.measure or suite.budget.unit == "cpu_seconds":
            first += [Job("measure", variant) for variant in variants]
        for variant in variants:
            rates = suite.rates(variant.entry)
            first += [Job("search", variant, 0, rate) for rate in rates if len(rates) > 1]
        runs = [[Job("run", variant, seed) for variant in variants] for seed in range(settings.seeds)]
        asked, smallest = suite.probes, min((variant.size or 0) for variant in variants)
        probed = [variant for variant in variants if (variant.size or 0) == smallest]
        probes = [Job("probe", variant, 0, asked.learning_rate, probe) for variant in probed for probe in asked.names] if asked else []
        self.shrinks = any(len(suite.rates(variant.entry)) > 2 for variant in variants)  # not all rates will be tried
        self.all = [*first, *runs[0], *probes, *(job for later in runs[1:] for job in later)]

    def of(self, variant: Variant, kind: Kind) -> list[Job]:
        return [job for job in self.all if job.variant is variant and job.kind == kind]

    # ---- what is chosen on the way ----

    def chosen_rate(self, variant: Variant) -> float | None:
        """The grid's best (the only one of a grid of one); None where none has an evaluation."""
        rates = self.suite.rates(variant.entry)
        if len(rates) == 1:
            return rates[0]
        tried = self._tried(variant)
        best = min(tried, key=lambda rate: tried[rate], default=None)
        return best if best is not None and tried[best] < math.inf else None

    def _tried(self, variant: Variant) -> dict[float, float]:
        """Rate -> what came of it, less is better and inf is nothing, in the order of the rates."""
        sign = 1 if variant.lower_is_better else -1
        ended = sorted((job.learning_rate or 0.0, self.value(job)) for job in self.of(variant, "search") if job.state in (DONE, FAILED))
        return {rate: math.inf if value is None else sign * value for rate, value in ended}

    def rates_to_try(self, variant: Variant) -> list[float]:
        """The next of the grid: the two lowest, then upwards until it gets worse. From below the loss falls smoothly to its best; far above
        it lies a plateau where nothing is learnt, whose bumps say nothing (docs/comparing.md), so no search begins there."""
        rates, tried = sorted(self.suite.rates(variant.entry)), self._tried(variant)
        if any(rate not in tried for rate in rates[:2]):
            return [rate for rate in rates[:2] if rate not in tried]
        highest = max(tried)
        return [rate for rate in rates if rate > highest][:1] if min(tried, key=lambda rate: tried[rate]) == highest else []

    def value(self, job: Job) -> float | None:
        """What the suite compares, of a finished training."""
        if job.values is None or job.summary is None:
            return None
        found = job.values.get(job.variant.metric)
        return float(found) if found is not None and math.isfinite(float(found)) else None

    # ---- the queue ----

    def take(self) -> Command[Job] | None:
        """The next job's command; None where all that waits is held back by what runs (or nothing waits). Rates that no longer need to
        be tried leave `all`."""
        running = [job.kind for job in self.all if job.state == RUNNING]
        if "measure" in running:  # beside another process, steps were timed at twice their cost
            return None
        waiting: list[Job] = []
        while waiting != (left := self._waiting()):  # what is read from its folder may let jobs before it start, or make them needless
            waiting = left
            for job in waiting:
                if job.state != WAITING or not self._ready(job) or (running and job.kind == "measure"):
                    continue
                command = self._command(job)
                if job.state == WAITING:
                    job.state = RUNNING
                    return command
        return None

    def _waiting(self) -> list[Job]:
        """What is still to run."""
        for variant in self.variants:
            searches = self.of(variant, "search")
            if not any(job.state == RUNNING for job in searches) and not self.rates_to_try(variant):
                self.all = [job for job in self.all if job not in searches or job.state != WAITING]
        return [job for job in self.all if job.state == WAITING]

    def _ready(self, job: Job) -> bool:
        if job.kind in ("measure", "probe"):
            return True
        weighed = self.of(job.variant, "measure") if not job.variant.steps else []
        searched = self.of(job.variant, "search") if job.kind == "run" else []
        if any(before.state in (WAITING, RUNNING) for before in (*weighed, *searched)):
            return False
        if weighed and not job.variant.steps:
            self._steps_from(weighed[0])
        if job.kind == "search" and job.learning_rate not in self.rates_to_try(job.variant):
            return False
        if not job.variant.steps or (job.kind == "run" and self.chosen_rate(job.variant) is None):
            job.state, job.problem = FAILED, "what it waits for has failed"
            return False
        return True

    def _steps_from(self, weighed: Job) -> None:
        if weighed.values is not None:
            weighed.variant.set_steps(weighed.values["step_cpu_seconds"], self.suite.budget.amount, self.suite.settings.search_share)

    def _command(self, job: Job) -> Command[Job] | None:
        """The process of a job that is ready; None, and the job done, where its folder holds the result already."""
        variant = job.variant
        if job.kind == "measure":
            return self._measurement(job)
        if job.kind == "probe":
            assert self.suite.probes is not None
            (tables, _), steps = probe_tables(self.suite, variant, job.probe), whole(self.suite.probes.steps)
        else:
            tables, steps = variant.tables, variant.search_steps if job.kind == "search" else variant.steps
        rate = job.learning_rate if job.learning_rate is not None else self.chosen_rate(variant)
        identity = with_code(tables) if job.kind == "probe" else variant.identity
        # a search or probe is judged by its last evaluation alone: three more were a third of a search's CPU time
        every = {"eval": {"eval_steps": steps // EVALUATIONS if job.kind == "run" else steps}, "checkpoint": {"save_steps": steps // EVALUATIONS}}
        tables = {**tables, **{name: {**tables.get(name, {}), **values} for name, values in every.items()}}
        name = f"{folder_name(variant.label)}-{job.probe or job.kind}-lr={rate:g}-seed={job.seed}"
        job.learning_rate = rate
        job.folder = self.output / "runs" / f"{name}-{digest(identity, rate, job.seed, steps, variant.fingerprint)}"
        recipe = self.output / "recipes" / f"{job.folder.name}.json"
        if self.read(job, steps):
            job.reused = True
            return None
        write_recipe(recipe, {**_trusted(tables), **tables})
        flags = [f"--seed={job.seed}", f"--learning_rate={rate}", f"--max_steps={steps}", f"--output_dir={job.folder}"]
        return Command(job, ("treadle", "train", str(recipe), *flags), job.folder / "suite.out")

    def _measurement(self, job: Job) -> Command[Job] | None:
        train, own = job.variant.tables.get("train", {}), job.variant
        request = {"reference": _described(self.variants[0]), "own": _described(own), "rows": own.rows, "seq_len": own.seq_len,
                   "precision": train.get("precision", "auto")}  # fmt: skip
        job.folder = self.output / "measured" / f"{folder_name(own.label)}-{digest(self.variants[0].identity, own.identity, own.rows, own.seq_len)}"
        if self.read(job, 0):
            job.reused = True
            return None
        write_json(job.folder / REQUEST, {**_trusted([self.variants[0].tables, own.tables]), **request})
        return Command(job, ("treadle.suite.measure", str(job.folder / REQUEST), str(job.folder / RESULT)), job.folder / "suite.out")

    def read(self, job: Job, steps: int) -> bool:
        """Takes the result over from the job's folder, where it is complete."""
        assert job.folder is not None
        path = job.folder / (RESULT if job.kind == "measure" else "summary.json")
        if not path.is_file():
            return False
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # half a file
            return False
        if job.kind == "measure":
            job.values, job.cpu_seconds = found, found["cpu_seconds"]
        else:
            if found.get("status") != "finished" or (steps and found.get("step") != steps):
                return False
            job.summary, job.cpu_seconds = found, found["cpu_seconds"]
            job.values = last_evaluation(job.folder / "eval_log.csv")
        job.state = DONE
        return True


def _trusted(named: Any) -> dict[str, Any]:
    """The run section that lets a process of a job use the code that this one was told to trust. No part of what a job is known by."""
    found = trusted_code.record(named)
    return {"run": {"trusted_code": found}} if found else {}


def _described(variant: Variant) -> dict[str, Any]:
    keys = {key: value for key, value in variant.tables["model"].items() if key not in ("arch", "preset")}
    return {"arch": variant.arch, "keys": keys}
