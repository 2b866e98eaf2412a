"""Learn from pairs which of two answers is preferred (DPO, Rafailov et al. 2023, arXiv 2305.18290), against a frozen reference."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.data.base import Dataset
from treadle.data.batch import Batch
from treadle.errors import ConfigError, InputError
from treadle.models.adapters import adapters_off
from treadle.models.base import Model, Output
from treadle.models.pretrained import load_run
from treadle.objectives.base import Losses, LossTerm, Metric
from treadle.objectives.next_token import NextToken, known_unit
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


class DirectPreference(NextToken):
    """DPO. A row of a batch holds pairs as documents: chosen, rejected, chosen, rejected, ...; labels are the answers' tokens.

    reference: a model of the library's user; without one it is found by the [task] keys, and a model with adapters is compared with
    itself without them.
    """

    headline = "dpo"
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
        if task.reference is None and task.reference_seed is None and task.reference_checksum is None and not self._given:
            task.reference, task.reference_seed = weights, seed if weights is None else None

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:
        super().prepare(model, dataset, device)
        if model.adapted and not self._given and self.task.reference in (None, self._start):
            return  # the base is the reference
        if self.reference is None:
            self.reference = self._found(model)
        found = checksum(self.reference)
        if self.task.reference_checksum not in (None, found) and not self._given:
            place = self.task.reference or "the model as it is here"
            raise InputError(f"the reference of this run is no longer what it was: {place} has other weights than when the run started; "
                             "give its place anew: --task.reference RUN@STEP")  # fmt: skip
        self.task.reference_checksum = found
        if self.reference.vocab_size != model.vocab_size:
            raise ConfigError(f"the model knows {model.vocab_size} tokens, its reference {self.reference.vocab_size}; start from the "
                              "reference (--from), or name another one (--task.reference)")  # fmt: skip
        self.reference.requires_grad_(False).eval().to(device)

    def _found(self, model: Model) -> Model:
        """The weights that the run starts with, whole, on the CPU."""
        if self.task.reference is not None:
            return load_run(self.task.reference, "cpu", tokenizer=False).model
        if self.task.reference_seed is not None:
            with shapes_only():
                drawn = type(model)(model.config)
            return drawn.materialise(self.task.reference_seed, "cpu")
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigError("the model has no weights yet, so there is no reference; give one: DirectPreference(reference=model)")
        return copy.deepcopy(model)

    # ---- the loss ----

    def counts(self, batch: Batch) -> dict[str, int]:
        return {**super().counts(batch), PAIRS: sum(_pairs_of(batch))}

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
        count = max(1, *_pairs_of(batch), 1)
        sums = sequence_log_probabilities(*model.linear_head(out.hidden), batch.labels, batch.doc_ids, 2 * count, model.logit_softcap)
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


def _pairs_of(batch: Batch) -> list[int]:
    """Pairs in each row."""
    counts = [sum(run > 0 for run in row) for row in batch.segments or ()]
    if any(count % 2 for count in counts):
        raise ConfigError("a row holds an answer without its other one; DPO needs rows of pairs: --data.dataset preferences")
    return [count // 2 for count in counts]


def _real_pairs(batch: Batch, like: Tensor) -> Tensor:
    """Bool [B, pairs]: false where a row has fewer pairs than another one."""
    counts = torch.tensor(_pairs_of(batch), device=like.device)
    return torch.arange(like.shape[1], device=like.device) < counts[:, None]


def checksum(model: Model) -> str:
    """A hash of a model's weights by name, the same for the same numbers wherever they were read from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_weights().items()):
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {list(whole.shape)}\n".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
