"""What is wanted of a model. An objective owns all of it: the terms of the loss, the metrics of an evaluation and how they
are printed, and what a sample looks like. The trainer, the log, `eval` and `compare` read it from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from treadle.data.base import Dataset
from treadle.data.batch import Batch
from treadle.models.base import Model
from treadle.objectives.settings import DEFAULT_OBJECTIVE
from treadle.registry import Registry
from treadle.settings import Settings

if TYPE_CHECKING:
    from treadle.objectives.sums import LossSums

OBJECTIVES = Registry("objective", {
    DEFAULT_OBJECTIVE: "treadle.objectives.next_token:NextToken",
    "sft": "treadle.objectives.fine_tuning:FineTuning",
    "dpo": "treadle.objectives.dpo:DirectPreference",
    "distill_mixer": "treadle.objectives.distill:MatchMixers",
    "distill_hidden": "treadle.objectives.distill:MatchHidden",
    "distill_logits": "treadle.objectives.distill:MatchLogits",
    "collatz": "treadle.collatz_tasks.parity:MultiTask",
    "collatz_delay": "treadle.collatz_tasks.parity:StoppingTime",
    "collatz_long_step": "treadle.collatz_tasks.long_step:LongStep",
}, base="treadle.objectives.base:Objective")  # fmt: skip


TOTAL = "total"  # as a headline: the sum of all terms, each with the weight that the objective gives it


@dataclass
class LossTerm:
    """One term of a loss: a fresh scalar sum, the unit it is divided by (a name in Batch.counts), and its own weight. Only
    training/step divides."""

    total: Tensor
    unit: str
    weight: float = 1.0


@dataclass
class Losses:
    """All terms of one forward pass by name, and statistics that ride along."""

    losses: dict[str, LossTerm]
    stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """How to read one number of an evaluation. usual: (sign, bound) of what a well-trained model reaches, as in
    ("<", 1.5); a value outside is marked, not judged. shown=False: a count that tables leave out."""

    lower_is_better: bool = True
    format: str = ".4f"
    label: str | None = None
    usual: tuple[str, float] | None = None
    shown: bool = True

    def show(self, value: float) -> str:
        """The value as the metric is written."""
        return format(value, self.format)

    def described(self) -> dict[str, Any]:
        """What a table of a report needs of it, for JSON."""
        return {"format": self.format, "usual": list(self.usual) if self.usual else None, "lower_is_better": self.lower_is_better}


class Objective(ABC):
    """Base of every objective. A subclass names `headline` and writes __call__; everything else has a default.

    headline: the loss term that people speak of, or TOTAL; its mean is the metric "loss". metrics: the numbers of an evaluation, in
    the order of tables. ranking_metric: the one that `compare` sorts out the best by. training_line, evaluation_line: what
    the console shows. Config: the keys of the [task] section that this objective understands; they arrive as `task`.
    """

    headline: ClassVar[str]
    further_passes: ClassVar[float] = 0.0  # forward passes of a frozen model of the same size in each step, for what `plan` counts
    only_planned: bool = False  # `treadle plan` asks for shapes and times: prepare allocates no further model and reads none
    metrics: ClassVar[Mapping[str, Metric]] = {"loss": Metric()}
    ranking_metric: ClassVar[str] = "loss"
    training_line: ClassVar[tuple[str, ...]] = ("loss",)
    evaluation_line: ClassVar[tuple[str, ...]] = ("loss",)
    Config: ClassVar[type[Settings] | None] = None

    def __init__(self, task: Any = None) -> None:
        self.task = task if task is not None else (self.Config() if self.Config is not None else None)

    def starts_from(self, weights: str | None, seed: int) -> None:  # noqa: B027 - most need not know
        """Told before `prepare` of a run on the command line: the place of the weights that it starts from, or None where they are drawn
        from `seed`."""

    def needs(self) -> list[str]:
        """Checkpoints that the run goes on needing, by their folders, once `prepare` is done: their runs keep them."""
        return []

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:  # noqa: B027 - most need nothing
        """Called once before the model is spread over processes and optimisers are made; may freeze parameters, and raises
        ConfigError where model and data do not fit each other."""

    @abstractmethod
    def __call__(self, model: Model, batch: Batch) -> Losses:
        """One forward pass; sums only."""

    def term_weights(self) -> Mapping[str, float]:
        """The weight that __call__ gives each term, where it is not 1; for objectives whose headline is TOTAL."""
        return {}

    def total(self, means: Mapping[str, float]) -> float:
        """The weighted sum of the terms' means."""
        weights = self.term_weights()
        return sum(weights.get(name, 1.0) * value for name, value in means.items())

    def lowest_loss(self, model: Model, dataset: Dataset) -> tuple[float, str] | None:
        """The least "loss" (nats a label, of cross-entropies) that an honest evaluation can reach, and why, where that is known; a target below it is refused."""
        return None

    def notes(self, model: Model) -> list[str]:
        """What people should know of the numbers of this model, a line each."""
        return []

    def callbacks(self) -> list[Any]:
        """Callbacks (training/callbacks/base.py) that belong to this objective; named like a user's own."""
        return []

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many of each unit a batch has, read on the host before its forward pass."""
        return batch.counts

    # ---- evaluation ----

    def begin_evaluation(self, data: Dataset) -> None:  # noqa: B027 - most need nothing
        """Called before the batches of `data` are evaluated."""

    def evaluation_sums(self, model: Model, batch: Batch) -> dict[str, Any]:
        """What an evaluation adds up (in fp64) over batches, by name; called without gradients, on the model's device.
        Here: each loss term, and the count of its unit as NAME/count."""
        return self.term_sums(self(model, batch).losses, batch)

    def term_sums(self, terms: Mapping[str, LossTerm], batch: Batch) -> dict[str, Any]:
        """Each term's sum in fp64, and the count of its unit as NAME/count."""
        found: dict[str, Any] = {}
        for name, term in terms.items():
            found[name] = term.total.double()
            found[f"{name}/count"] = self.counts(batch)[term.unit]
        return found

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over all evaluation data -> metrics; at least "loss"."""
        means = {name: total / max(1.0, sums[f"{name}/count"]) for name, total in sums.items() if f"{name}/count" in sums}
        if self.headline == TOTAL:
            return {"loss": self.total(means), **{f"loss_{name}": value for name, value in means.items()}}
        return {"loss": means.pop(self.headline), **{f"loss_{name}": value for name, value in means.items()}}

    def metric(self, name: str) -> Metric:
        """How to read a metric of this name; a plain one where the objective does not say."""
        return self.metrics.get(name, Metric())

    def shown(self, metrics: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """How tables print these metrics (Metric.described), without those that they leave out. "lower_is_better" is None for one of which
        the objective says nothing: no table marks a best of it."""
        unsaid = {"lower_is_better": None}
        return {name: self.metric(name).described() | (unsaid if name not in self.metrics else {}) for name in metrics if self.metric(name).shown}

    def evaluation_text(self, metrics: dict[str, float]) -> str:
        """The console's line of an evaluation."""
        return "  ".join(f"{self.metric(n).label or n} {self.metric(n).show(metrics[n])}" for n in self.evaluation_line if n in metrics)

    # ---- the log ----

    def training_metrics(self, sums: LossSums) -> dict[str, float]:
        """Further columns of a training row, from what was added up since the last one."""
        return {}

    def training_text(self, row: dict[str, Any]) -> str:
        """The task's part of the console's line of a training row."""
        shown = [n for n in self.training_line if row.get(n) is not None]
        return "  ".join(f"{self.metric(n).label or n} {self.metric(n).show(row[n])}" for n in shown)

    def console_line(self, row: Mapping[str, Any], seconds: float) -> str:
        """The whole line of a training row in a pipe, for tasks whose users know another one; "" is the usual line. seconds: of
        the steps since the last one."""
        return ""

    # ---- samples and baselines ----

    def sample(self, model: Model, dataset: Dataset, prompt: str, tokens: int, seed: int) -> str:
        """What a sample of this model looks like, for the file that each evaluation writes; "" writes none."""
        return ""

    def samples(self, model: Model, dataset: Dataset, count: int) -> tuple[list[dict[str, str]], dict[str, float]]:
        """`count` samples for `treadle eval`, each {"prompt", "text"}, and metrics over them."""
        texts = [self.sample(model, dataset, "", 0, seed) for seed in range(count)]
        return [{"prompt": "", "text": text} for text in texts if text], {}

    def baselines(self, train: Dataset, held_out: Dataset) -> dict[str, dict[str, float]]:
        """Metrics that anyone gets without a model, by the baseline's name."""
        return {}


class ModelWithObjective(nn.Module):
    """A model with its objective: what training wraps, so that head and loss run inside one forward."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, *arguments: Any, work: Callable[..., Any] | None = None) -> Any:
        """The objective's Losses for a batch; with `work`, work(model, ...) instead: whatever reads weights that are in
        shards has to happen inside this call."""
        return (work or self.objective)(self.model, *arguments)


# FSDP finds the tensors that backward starts from by walking the output as a pytree.
pytree.register_pytree_node(
    LossTerm, lambda p: ([p.total], (p.unit, p.weight)), lambda totals, rest: LossTerm(next(iter(totals)), *rest)
)
pytree.register_pytree_node(Losses, lambda p: ([p.losses, p.stats], None), lambda values, _: Losses(*values))
