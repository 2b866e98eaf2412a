"""Rows of parities (and rows of digits) with the stopping time beside them, and the multi-task objective on both.

Stated so that nothing leaks: every row has the same number of parities and belongs to a trajectory longer than that, so the
length of a row says nothing of the stopping time; the next step is predicted from what stands before it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.collatz.arithmetic import number
from treadle.collatz.trajectories import delays, labels
from treadle.collatz_tasks.floor import Floor, floor, floor_of_kind
from treadle.collatz_tasks.ladder import Ladder
from treadle.collatz_tasks.numbers import (
    HIGH,
    KIND,
    LOW,
    STEPS,
    TEST_RECORD,
    Numbers,
    NumberSource,
    digit_count,
    digits,
    exact_number,
)
from treadle.collatz_tasks.settings import KINDS, LARGEST, DelayKeys, NumberKeys, ParityKeys
from treadle.data.base import Dataset
from treadle.data.batch import IGNORE, PAD, Batch
from treadle.data.generated import SPLITS, GeneratedDataset
from treadle.errors import ConfigError
from treadle.models.base import LM_HEAD, Model, Output
from treadle.models.collatz import STOPPING
from treadle.objectives.base import TOTAL, Losses, LossTerm, Metric, Objective
from treadle.ops.cross_entropy import linear_cross_entropy

SAMPLE = 4096  # rows from which the head's start and the ladder follow
BIDIRECTIONAL = "this model sees the whole row (causal = false): the next step's accuracy and cross-entropy are not predictions"


class TrajectoryDataset(GeneratedDataset):
    """Base of rows that begin with a number; a subclass says what the row shows of it."""

    task: NumberKeys

    def __init__(self, task: Any = None, seed: int = 0, split: str = "train", seq_len: int | None = None) -> None:
        super().__init__(task, seed, split)
        self.source = NumberSource(self.task, self.seed, SPLITS.index(split))

    def extras(self, numbers: Numbers, steps: np.ndarray) -> dict[str, Tensor]:
        """The number travels as two halves of 64 bits: no float ever holds it."""
        as_int = {LOW: numbers.low.view(np.int64), HIGH: numbers.high.view(np.int64), STEPS: steps, KIND: numbers.kinds}
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in as_int.items()}

    def model_keys(self) -> dict[str, Any]:
        """The head of the stopping time starts at the mean, in units of the deviation, of the first training numbers of seed 0."""
        numbers = NumberSource(self.task, 0, 0).numbers(np.arange(SAMPLE))
        logs = np.log1p(delays(numbers.low, numbers.high).astype(np.float64))
        return {"vocab_size": self.tokens, "max_position_embeddings": self.seq_len, "stopping_mean": round(float(logs.mean()), 6),
                "stopping_deviation": round(max(1e-3, float(logs.std())), 6)}  # fmt: skip

    @property
    def tokens(self) -> int:
        return 2

    def ladder(self) -> Ladder:
        """How well the stopping time is known from exact low bits, on numbers like these."""
        numbers = NumberSource(self.task, 0, max(1, SPLITS.index(self.split))).numbers(np.arange(SAMPLE))
        return Ladder.measured(numbers.low, numbers.high)

    def describe(self) -> str:
        kinds = ", ".join(f"{share:.0%} {kind}" for kind, share in self.task.shares.items())
        rows = "rows made as they are wanted" if self.split == "train" else f"{self.evaluation_rows:,} rows never trained on"
        return f"{rows}, {self.seq_len} tokens each; numbers: {kinds}"


class Parities(TrajectoryDataset):
    """Rows of the first `length` parities of trajectories (1 = odd), labels the parity after each."""

    Config = ParityKeys
    name = "collatz"
    task: ParityKeys
    seq_len = property(lambda self: self.task.length)

    def generate(self, rows: np.ndarray) -> Batch:
        length, shortcut = self.task.length, self.task.parity_steps == "shortcut"
        numbers = self.source.numbers(rows)
        parities, steps = labels(numbers.low, numbers.high, length + 1, shortcut)
        ids = torch.from_numpy(parities.astype(np.int64))
        # A number from 2^(L + 1) on is above 1 after L steps; of smaller ones, more than two standard steps for each are enough.
        small = numbers.below(length + 1)
        short = torch.from_numpy(small & (steps <= (2 * length if shortcut else length)))
        targets, documents = ids[:, 1:], None
        if bool(short.any()):
            targets = targets.masked_fill(short[:, None], IGNORE)
            documents = torch.zeros_like(targets).masked_fill(short[:, None], PAD)
        return Batch.from_ids(ids[:, :-1], documents, targets, self.extras(numbers, steps))

    def floor(self) -> Floor:
        return floor(self.task)


class Digits(TrajectoryDataset):
    """Rows of all digits of a number; nothing but the stopping time is asked for."""

    Config = DelayKeys
    name = "collatz_delay"
    task: DelayKeys

    @property
    def seq_len(self) -> int:  # type: ignore[override]
        """The same for all splits: what the largest number of any of them needs."""
        bits = {"sequential": number(self.task.start).bit_length() + 14, "dense": LARGEST, "uniform": self.task.uniform_bits + 5}
        return digit_count(1 << min(128, max(bits.get(kind, TEST_RECORD.bit_length() + 1) for kind in self.task.shares)), self.task.base)

    @property
    def tokens(self) -> int:
        return self.task.base

    def generate(self, rows: np.ndarray) -> Batch:
        numbers = self.source.numbers(rows)
        shown = digits(numbers.low, numbers.high, self.task.base, self.seq_len)
        if not self.task.low_digits_first:
            shown = np.ascontiguousarray(shown[:, ::-1])
        return Batch.from_ids(torch.from_numpy(shown), extras=self.extras(numbers, delays(numbers.low, numbers.high)))


class StoppingTime(Objective):
    """The stopping time alone: Huber loss of log(1 + steps), for data without labels."""

    headline = TOTAL
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": Metric(),
        "loss_stopping": Metric(label="stopping"),
        "stopping_error": Metric(format=".1f", label="error in steps"),
        "stopping_r2": Metric(lower_is_better=False, format=".3f", label="R2"),
        "effective_bits": Metric(lower_is_better=False, format=".1f", label="effective bits"),
    }
    ranking_metric = "stopping_r2"
    training_line: ClassVar[tuple[str, ...]] = ("loss",)
    evaluation_line: ClassVar[tuple[str, ...]] = ("loss", "stopping_error", "stopping_r2", "effective_bits")

    def __init__(self, task: Any = None) -> None:
        super().__init__(task)
        self.ladder: Ladder | None = None
        # Errors, low and high of the rows of the step that is running, for the callback.
        self.watched: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=1024)

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:
        if getattr(model, "stopping", None) is None:
            raise ConfigError(f"the model {model.arch} has no head for the stopping time; train --model.arch collatz (with stopping_head)")

    def begin_evaluation(self, data: Dataset) -> None:
        if isinstance(data, TrajectoryDataset):
            self.ladder = data.ladder()

    @property
    def stopping_weight(self) -> float:
        return float(getattr(self.task, "stopping_weight", 1.0))

    def __call__(self, model: Model, batch: Batch) -> Losses:
        hidden = model.hidden(batch).hidden
        assert hidden is not None
        return Losses(self._terms(model, batch, hidden))

    def _terms(self, model: Any, batch: Batch, hidden: Tensor) -> dict[str, LossTerm]:
        found = model.stopping_time(hidden, batch)
        wanted, real = torch.log1p(batch.extras[STEPS].float()), batch.token_mask[:, 0]
        huber = F.huber_loss(found, wanted, reduction="none")
        if torch.is_grad_enabled():
            self.watched.append(((found.detach() - wanted).masked_fill(~real, 0), batch.extras[LOW], batch.extras[HIGH]))
        return {STOPPING: LossTerm((huber * real).sum(), "rows", self.stopping_weight)}

    def callbacks(self) -> list[Any]:
        from treadle.collatz_tasks.watching import Anomalies, SearchBeside

        return [Anomalies(), SearchBeside()]

    # ---- evaluation ----

    def evaluation_sums(self, model: Model, batch: Batch) -> dict[str, Any]:
        return self._sums(model, batch, model(batch))

    def _sums(self, model: Model, batch: Batch, out: Output) -> dict[str, Any]:
        assert out.hidden is not None
        sums = self.term_sums(self._terms(model, batch, out.hidden), batch)
        real = batch.token_mask[:, 0]
        steps = batch.extras[STEPS].double()[real]
        error = torch.expm1(out.predictions[STOPPING].double()[real]) - steps
        return sums | {"absolute_error": error.abs().sum(), "squared_error": error.square().sum(), "steps": steps.sum(),
                       "steps_squared": steps.square().sum(), "rows": batch.counts["rows"]}  # fmt: skip

    def term_weights(self) -> dict[str, float]:
        return {STOPPING: self.stopping_weight}

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        found = super().compute_metrics(sums)
        if rows := sums.get("rows"):
            spread = sums["steps_squared"] - sums["steps"] ** 2 / rows
            found |= {"stopping_error": sums["absolute_error"] / rows, "stopping_r2": 1 - sums["squared_error"] / max(1e-9, spread)}
            if self.ladder is not None:
                found["effective_bits"] = self.ladder.bits(found["stopping_r2"])
        return found

    def samples(self, model: Model, dataset: Any, count: int) -> tuple[list[dict[str, str]], dict[str, float]]:
        return [{"prompt": "", "text": self.sample(model, dataset, "", 0, 0)}][:count], {}

    def sample(self, model: Model, dataset: Dataset, prompt: str, tokens: int, seed: int) -> str:
        """Predictions beside truths, with the exact numbers."""
        batch = next(iter(dataset.in_sequence(16, 16))).to(model.device)
        with torch.no_grad():
            found = torch.expm1(model(batch).predictions[STOPPING].double())
        lines = ["number, stopping time, predicted"]
        for low, high, steps, guess in zip(*(batch.extras[name].tolist() for name in (LOW, HIGH, STEPS)), found.tolist()):
            lines.append(f"{exact_number(low, high)}  {steps}  {guess:.1f}")
        return "\n".join(lines) + "\n"


class MultiTask(StoppingTime):
    """The next step's parity (cross-entropy) and the stopping time (Huber loss of log(1 + steps)), summed with weights."""

    Config = ParityKeys
    metrics: ClassVar[Mapping[str, Metric]] = {
        **StoppingTime.metrics,
        "loss_next_step": Metric(label="next step"),
        "accuracy": Metric(lower_is_better=False, format=".2%"),
        "floor": Metric(label="floor"),
        "accuracy_ceiling": Metric(lower_is_better=False, format=".2%", label="at most"),
        **{f"next_step_{kind}": Metric(shown=False) for kind in KINDS},
        **{f"floor_{kind}": Metric(shown=False) for kind in KINDS},
    }
    ranking_metric = "loss"
    evaluation_line: ClassVar[tuple[str, ...]] = ("loss", "loss_next_step", "floor", "accuracy", "accuracy_ceiling", "stopping_error", "stopping_r2")

    def __init__(self, task: Any = None) -> None:
        super().__init__(task)
        self.predictive = True
        self.floors: dict[str, Floor] = {}

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:
        if LM_HEAD not in model.heads():
            raise ConfigError(f"the model {model.arch} has no head called {LM_HEAD} for the next step")
        self.predictive = model.capabilities.causal

    def begin_evaluation(self, data: Dataset) -> None:
        super().begin_evaluation(data)
        if isinstance(data, Parities):
            self.floors = {kind: floor_of_kind(data.task, kind) for kind in data.task.shares}

    def lowest_loss(self, model: Model, dataset: Dataset) -> tuple[float, str] | None:
        if not isinstance(dataset, Parities) or not self.predictive:
            return None
        lowest = dataset.floor()
        weight = self.term_weights()["next_step"]
        why = (f"the next step of numbers that nobody has seen costs {lowest.nats:.4f} nats at least (accuracy at most "
               f"{lowest.accuracy:.1%}): the first parities of n are fair coins where n is random (ln 2 = .6931 a shortcut step)")  # fmt: skip
        return weight * lowest.nats, why

    def notes(self, model: Model) -> list[str]:
        return [] if model.capabilities.causal else [BIDIRECTIONAL]

    def term_weights(self) -> dict[str, float]:
        return {**super().term_weights(), "next_step": float(getattr(self.task, "step_weight", 1.0))}

    def __call__(self, model: Model, batch: Batch) -> Losses:
        out = model.hidden(batch)
        assert out.hidden is not None and batch.labels is not None
        total = linear_cross_entropy(*model.linear_head(out.hidden), batch.labels, model.logit_softcap)
        terms = {"next_step": LossTerm(total, "labels", self.term_weights()["next_step"])}
        if getattr(model, STOPPING, None) is not None:
            terms |= self._terms(model, batch, out.hidden)
        return Losses(terms, out.stats)

    def evaluation_sums(self, model: Model, batch: Batch) -> dict[str, Any]:
        assert batch.labels is not None
        self.predictive = model.capabilities.causal
        out = model(batch)
        found = self._sums(model, batch, out) if STOPPING in out.predictions else {}
        assert out.logits is not None
        nats = F.cross_entropy(out.logits.float().transpose(1, 2), batch.labels, ignore_index=IGNORE, reduction="none").double()
        scored = batch.labels != IGNORE
        right = (out.logits.argmax(-1) == batch.labels) & scored
        found |= {"next_step": nats.sum(), "next_step/count": batch.counts["labels"], "right": right.sum()}
        for kind, name in enumerate(KINDS):
            here = (batch.extras[KIND] == kind)[:, None] & scored
            found |= {f"nats_{name}": (nats * here).sum(), f"labels_{name}": here.sum()}
        return found

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        found = super().compute_metrics(sums)
        labelled = max(1.0, sums["next_step/count"])
        found["accuracy"] = sums["right"] / labelled
        counts = {name: sums[f"labels_{name}"] for name in KINDS if sums[f"labels_{name}"]}
        found |= {f"next_step_{name}": sums[f"nats_{name}"] / count for name, count in counts.items()}
        if self.predictive and all(name in self.floors for name in counts):
            shares = {name: count / labelled for name, count in counts.items()}
            found |= {f"floor_{name}": self.floors[name].nats for name in counts}
            found["floor"] = sum(share * self.floors[name].nats for name, share in shares.items())
            found["accuracy_ceiling"] = sum(share * self.floors[name].accuracy for name, share in shares.items())
        return found

    def console_line(self, row: Mapping[str, Any], seconds: float) -> str:
        """As in: Step 100000 | Loss: 0.7160 (Stop: 0.0229, Seq: 0.6931) | LR: 4.13e-05 | Time: 26.83s."""
        parts = [f"{name}: {value:.4f}" for name, value in (("Stop", row.get("loss_stopping")), ("Seq", row.get("loss_next_step"))) if value is not None]
        loss = row["loss"] if row.get("loss") is not None else math.nan
        return f"Step {row['step']} | Loss: {loss:.4f} ({', '.join(parts)}) | LR: {row['learning_rate']:.2e} | Time: {seconds:.2f}s"
