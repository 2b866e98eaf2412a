"""Learn from pairs which of two answers is preferred (DPO, Rafailov et al. 2023, arXiv 2305.18290), against a frozen reference."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.data.base import Dataset
from treadle.data.batch import Batch
from treadle.data.preferences import pairs_of
from treadle.errors import ConfigError, InputError, TreadleError
from treadle.models.adapters import adapters_off
from treadle.models.base import Model, Output
from treadle.models.pretrained import load_run, locate, weights_checksum
from treadle.objectives.base import Losses, LossTerm, Metric
from treadle.objectives.fine_tuning import FineTuning
from treadle.objectives.next_token import known_unit
from treadle.objectives.settings import PreferenceSettings
from treadle.objectives.sums import LossSums
from treadle.ops.quick_start import shapes_only
from treadle.ops.sequence_log_probabilities import sequence_log_probabilities

PAIRS = "pairs"  # the unit of every term: a batch's documents 2k and 2k + 1 of a row are the chosen and the rejected answer of pair k
FOUND = ("reward_margin", "accuracy", "chosen_reward", "rejected_reward")


def preference_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Log-probabilities of whole answers, [pairs] each -> -log sigmoid(beta ((chosen - reference_chosen) - (rejected -
    reference_rejected))), [pairs]. label_smoothing e: (1 - e) of that and e of the same for the pair the other way round."""
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


class DirectPreference(FineTuning):
    """DPO. A row of a batch holds pairs as documents: chosen, rejected, chosen, rejected, ...; labels are the answers' tokens.

    reference: a model of the library's user; without one it is found by the [task] keys, and a model with adapters is compared with
    itself without them.
    """

    headline = "dpo"
    further_passes = 1.0
    Config = PreferenceSettings
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": Metric(),
        "reward_margin": Metric(lower_is_better=False, label="margin"),
        "accuracy": Metric(lower_is_better=False),
        "chosen_reward": Metric(lower_is_better=False),
        "rejected_reward": Metric(),
        "pairs": Metric(shown=False),
    }
    ranking_metric = "loss"
    training_line: ClassVar[tuple[str, ...]] = ("loss", "reward_margin", "accuracy")
    evaluation_line: ClassVar[tuple[str, ...]] = ("loss", "reward_margin", "accuracy")
    task: PreferenceSettings

    def __init__(self, task: Any = None, reference: Model | None = None) -> None:
        super().__init__(task)
        self._given = reference is not None
        self._start: str | None = None  # the place of the weights that the run starts with, where it has one
        self.reference = reference

    # ---- the reference ----

    def starts_from(self, weights: str | None, seed: int) -> None:
        task, self._start = self.task, weights
        if self._given:
            return
        if task.reference is None and task.reference_seed is None:
            task.reference, task.reference_seed = weights, seed if weights is None else None
        if task.reference is not None and task.reference_checksum is None:
            found = locate(task.reference)
            task.reference, task.reference_checksum = str(Path(found.folder).resolve()), weights_checksum(found)

    def needs(self) -> list[str]:
        return [self.task.reference] if self.task.reference is not None else []

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:
        super().prepare(model, dataset, device)
        if model.adapted and not self._given and self.task.reference in (None, self._start):
            return  # the base is the reference
        if not model.capabilities.packs:
            raise ConfigError(f"the model {model.arch} reads one document a row, and DPO has both answers of a pair in one; choose another")
        if self.only_planned:
            return
        if self.reference is None:
            self.reference = self._found(model)
        if self.reference.vocab_size != model.vocab_size:
            raise ConfigError(f"the model knows {model.vocab_size} tokens, its reference {self.reference.vocab_size}; start from the "
                              "reference (--from), or name another one (--task.reference)")  # fmt: skip
        self.reference.requires_grad_(False).eval().to(device)

    def _found(self, model: Model) -> Model:
        """The weights that the run starts with, whole, on the CPU."""
        place = self.task.reference
        if place is None and self.task.reference_seed is not None:
            with shapes_only():
                drawn = type(model)(model.config)
            return drawn.materialise(self.task.reference_seed, "cpu")
        if place is None:
            raise ConfigError("DPO has no reference: give one (DirectPreference(reference=copy.deepcopy(model))), or say where it is: "
                              "--task.reference RUN")  # fmt: skip
        anew = "tell the run where it is: treadle train RUN --task.reference PLACE --allow-change task"
        try:
            found = locate(place)
        except TreadleError as problem:
            raise InputError(f"the reference of this run is gone ({problem}); {anew}") from None
        if self.task.reference_checksum not in (None, weights_checksum(found)):
            raise InputError(f"the reference of this run is no longer what it was: {place} holds other weights than when the run started; "
                             f"put it back, or {anew}")  # fmt: skip
        return load_run(place, "cpu", tokenizer=False).model

    # ---- the loss ----

    def counts(self, batch: Batch) -> dict[str, int]:
        return {**super().counts(batch), PAIRS: sum(pairs_of(batch))}

    def __call__(self, model: Model, batch: Batch) -> Losses:
        theirs = self._references(model, batch)
        ours, out = self._log_probabilities(model, batch)
        each, found = self._compared(ours, theirs)
        real = _real_pairs(batch, each)
        losses = {self.headline: LossTerm(torch.where(real, each, 0.0).sum(), PAIRS)}
        for name, (total, unit) in out.losses.items():
            losses[name] = LossTerm(total, known_unit(unit))
        for name, values in found.items():  # counted exactly over micro-batches and processes, and of no weight
            losses[name] = LossTerm(torch.where(real, values.detach(), 0.0).sum(), PAIRS, 0.0)
        return Losses(losses, out.stats)

    def _compared(self, ours: Tensor, theirs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities [B, pairs, 2] of model and reference -> (loss [B, pairs], what metrics are made of)."""
        each = preference_loss(ours[..., 0], ours[..., 1], theirs[..., 0], theirs[..., 1], self.task.beta, self.task.label_smoothing)
        rewards = self.task.beta * (ours - theirs).detach()
        margin = rewards[..., 0] - rewards[..., 1]
        return each, dict(zip(FOUND, (margin, (margin > 0).float(), rewards[..., 0], rewards[..., 1])))

    @torch.no_grad()
    def _references(self, model: Model, batch: Batch) -> Tensor:
        """What the reference says, without dropout."""
        with ExitStack() as left:
            if self.only_planned and not model.adapted:
                self.reference = type(model)(model.config).eval()  # as large as the model, whatever its weights
            reference = self.reference
            if reference is None:
                if not model.adapted:
                    raise ConfigError("DPO has no reference: call prepare(model, dataset, device) first")
                left.enter_context(adapters_off(model))
                left.callback(model.train, model.training)
                reference = model.eval()
            return self._log_probabilities(reference, batch)[0]

    def _log_probabilities(self, model: Model, batch: Batch) -> tuple[Tensor, Output]:
        """[B, pairs, 2]: of each answer, the sum over its tokens; and the model's output."""
        if batch.labels is None or batch.doc_ids is None:
            raise ConfigError("DPO needs rows of pairs, each a chosen and a rejected answer; choose the data: --data.dataset preferences")
        out = model.hidden(batch)
        assert out.hidden is not None
        count = max(1, *pairs_of(batch), 1)
        sums = sequence_log_probabilities(
            *model.linear_head(out.hidden), batch.labels, batch.doc_ids, 2 * count, batch.counts["labels"], model.logit_softcap
        )
        return sums.unflatten(-1, (count, 2)), out

    # ---- evaluation ----

    def evaluation_sums(self, model: Model, batch: Batch) -> dict[str, Any]:
        return self.term_sums(self(model, batch).losses, batch)

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        pairs = sums[f"{self.headline}/count"]
        means = {name: sums[name] / max(1.0, pairs) for name in (self.headline, *FOUND)}
        return {"loss": means.pop(self.headline), **means, "pairs": pairs}

    def training_metrics(self, sums: LossSums) -> dict[str, float]:
        return {name: sums.means[name] for name in FOUND if name in sums.means}

    def baselines(self, train: Dataset, held_out: Dataset) -> dict[str, dict[str, float]]:
        """The reference itself: log 2, whatever it says."""
        return {"reference": {"loss": 0.6931471805599453}}


def _real_pairs(batch: Batch, like: Tensor) -> Tensor:
    """Bool [B, pairs]: false where a row has fewer pairs than another one."""
    counts = torch.tensor(pairs_of(batch), device=like.device)
    return torch.arange(like.shape[1], device=like.device) < counts[:, None]
