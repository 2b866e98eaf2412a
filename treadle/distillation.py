"""`treadle distill`: a student from a teacher, one run a stage, and a report of what was kept.

Each stage is an ordinary run with its own objective, so that resuming, logging and several processes work as everywhere;
a later stage starts from the weights of the one before it. Stages but the last live in RUN/stages/.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from treadle import trusted_code
from treadle.data.base import Dataset
from treadle.distributed.environment import detect
from treadle.errors import ConfigError
from treadle.evaluation.evaluator import Evaluator
from treadle.evaluation.report import held_out
from treadle.models.base import Model
from treadle.models.catalogue import MODELS
from treadle.models.pretrained import load_run, locate, read_config
from treadle.monitor import records
from treadle.monitor.console import Console
from treadle.objectives.distill import make_objective
from treadle.objectives.settings import DistillSettings, Stage
from treadle.ops.divergence import linear_divergence
from treadle.recipe import Layer, compose
from treadle.start import Request, free_folder, opened_world, train_in
from treadle.training.config import Recipe
from treadle.training.trainer import Trainer

STUDENT = "ssm"
CONTEXTS = (1024, 8192)


def distill(request: Request, console: Console | None = None) -> dict[str, Any]:
    """Runs all stages (or continues them) and returns the last one's summary with the report. ConfigError without a
    teacher."""
    console = console or Console(silent=detect().rank != 0)
    request = replace(request, base=(Layer({"model.arch": STUDENT}, "default"),))
    asked = compose(request.layers())
    if asked.distill.teacher is None:
        raise ConfigError("there is no teacher; say --teacher RUN (a run, a checkpoint, or an exported folder)")
    request = replace(request, base=(_from_teacher(asked.distill.teacher, asked.arch),))
    recipe = compose(request.layers())
    with opened_world(request) as world:
        folder = recipe.folder
        if request.fresh:
            folder = free_folder(folder) if world is None else Path(world.on_main_first(lambda: str(free_folder(recipe.folder))))
        before: Path | None = None
        summary: dict[str, Any] = {}
        for stage, steps in stage_steps(recipe.distill, recipe.train.max_steps):
            last = stage == recipe.distill.stages[-1]
            here = stage_folder(folder, stage, recipe.distill)
            console.say(f"Stage {stage}: {steps} steps in {here}")
            above = {"run.output_dir": str(here), "run.run_name": folder.name if last else f"{folder.name}-{stage}",
                     "distill.stage": stage, "train.max_steps": steps}  # fmt: skip
            if not last:
                above["eval.at_end"] = False
            one = replace(request, above=(Layer(above, "the stage"),), fresh=False,
                          weights_from=str(before) if before is not None else request.weights_from)  # fmt: skip
            summary = train_in(world, one, console)
            before = here
        if world is None or world.is_main_process:
            summary["distillation"] = report(asked.distill.teacher, str(folder))
            records.write_json(folder / "results" / "distillation.json", summary["distillation"])
            for line in table_of(summary["distillation"]):
                console.say(line)
    return summary


def _from_teacher(teacher: str, arch: str) -> Layer:
    """What a student takes from its teacher where nobody says otherwise: shape, tokenizer and data."""
    checkpoint = locate(teacher)
    table = read_config(checkpoint)
    model = _shape_for(arch, table.get("model", {}))
    name = table.get("run", {}).get("run_name") or checkpoint.folder.name
    return Layer({"model": {"arch": arch, **model}, "data": table.get("data", {}), "run": {"run_name": f"{name}-{arch}"}},
                 f"the teacher {teacher}")  # fmt: skip


def _shape_for(arch: str, teacher: dict[str, Any]) -> dict[str, Any]:
    """The teacher's model keys that a student architecture knows."""
    known = MODELS.get(arch).Config.model_fields
    shape = {key: value for key, value in teacher.items() if key in known}
    if "num_streams" in known:
        shape.setdefault("num_streams", 1)  # a plain transformer has one residual stream
    return shape


def stage_folder(folder: Path, stage: Stage, settings: DistillSettings) -> Path:
    """Where a stage runs: the last one in the run's own folder."""
    return folder if stage == settings.stages[-1] else folder / "stages" / stage


def stage_steps(settings: DistillSettings, total: int | None) -> list[tuple[Stage, int]]:
    """(stage, steps) in order; max_steps counts all stages. ConfigError when nothing is left for the last."""
    if total is None:
        raise ConfigError("say how many steps all stages have together: --max_steps N")
    wanted = {"mixer": settings.mixer_steps, "hidden": settings.hidden_steps}
    found: list[tuple[Stage, int]] = []
    left = total
    for stage in settings.stages[:-1]:
        steps = wanted[stage] or max(1, total // 4)
        found.append((stage, steps))
        left -= steps
    if left < 1:
        raise ConfigError(f"max_steps = {total} leaves nothing for the stage {settings.stages[-1]}; raise it, or lower "
                          "--mixer_steps")  # fmt: skip
    return [*found, (settings.stages[-1], left)]


# ---- what was kept ----


def report(teacher: str, student: str, rows: int | None = 256) -> dict[str, Any]:
    """Loss of both on the student's held-out text, how often they agree, and the bytes of a decoding state."""
    ours, theirs = load_run(student), load_run(teacher)
    data = held_out(ours.config, ours.tokenizer, None)["validation"]
    table: dict[str, Any] = {"agreement": agreement(ours.model, theirs.model, data, rows)}
    for name, loaded in (("teacher", theirs), ("student", ours)):
        metrics = Evaluator(loaded.model, loaded.tokenizer).evaluate(data, rows=rows) or {}
        table[name] = {"loss": metrics["loss"], "bpb": metrics["bpb"], "parameters": loaded.model.parameter_count(),
                       "state_bytes": {str(n): loaded.model.state_bytes(1, n) for n in CONTEXTS}}  # fmt: skip
    return table


@torch.no_grad()
def agreement(ours: Model, theirs: Model, data: Dataset, rows: int | None = 256, batch_size: int = 8) -> float:
    """Share of positions where both find the same token likeliest."""
    agreed = scored = 0
    for batch in data.in_sequence(batch_size, rows):
        batch = batch.to(ours.device)
        hidden, other = ours.hidden(batch).hidden, theirs.hidden(batch).hidden
        assert batch.labels is not None and hidden is not None and other is not None
        _, same = linear_divergence(*ours.linear_head(hidden), *theirs.linear_head(other), batch.labels, 1.0)
        agreed, scored = agreed + int(same), scored + batch.counts["labels"]
    return agreed / max(1, scored)


def table_of(found: dict[str, Any]) -> list[str]:
    """Teacher and student side by side, as lines."""
    lines = [f"{'':<10}{'loss':>9}{'bpb':>9}" + "".join(f"{f'state at {n}':>16}" for n in CONTEXTS)]
    for name in ("teacher", "student"):
        row = found[name]
        cells = "".join(f"{row['state_bytes'][str(n)] / 1e3:>13.1f} kB" for n in CONTEXTS)
        lines.append(f"{name:<10}{row['loss']:>9.4f}{row['bpb']:>9.4f}{cells}")
    return [*lines, f"the same token likeliest: {found['agreement']:.3f}"]


class DistillationTrainer:
    """The same for library users: a teacher, a student (made by `student_of` or any model), data, and a configuration
    whose [distill] keys say how. `train()` runs the stages and returns the last summary."""

    def __init__(
        self, teacher: Model, student: Model, dataset: Dataset, eval_dataset: Dataset | None = None,
        config: Recipe | None = None, callbacks: Sequence[Any] = (),
    ) -> None:  # fmt: skip
        self.teacher, self.student, self.config = teacher, student, config or Recipe()
        self.dataset, self.eval_dataset, self.callbacks = dataset, eval_dataset, callbacks

    def train(self) -> dict[str, Any]:
        """Runs the stages one after the other, or goes on with them; returns the last summary with the report."""
        settings, folder = self.config.distill, self.config.folder
        summary: dict[str, Any] = {}
        for stage, steps in stage_steps(settings, self.config.train.max_steps):
            recipe = copy.deepcopy(self.config)
            recipe.distill.stage = stage
            recipe.train.max_steps = steps
            recipe.run.output_dir = str(stage_folder(folder, stage, settings))
            objective = make_objective(recipe.distill, self.teacher)
            summary = Trainer(self.student, self.dataset, self.eval_dataset, recipe, objective, self.callbacks).train()
        return summary


def student_of(teacher: Model, arch: str = STUDENT, seed: int = 0, **keys: Any) -> Model:
    """A student with the teacher's configuration and every weight of it that fits; `keys` change the configuration
    (local_window=0 for a pure state-space model)."""
    trusted_code.allow_names(arch)
    cls, shape = MODELS.get(arch), _shape_for(arch, teacher.config.model_dump())
    with torch.device("meta"):
        student = cls(cls.Config.with_preset(None, **{**shape, **keys}))
    student.start_from(teacher.named_weights())
    return student.materialise(seed, teacher.device)
