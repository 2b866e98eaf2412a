"""The long step as a translation of digits: odd n = 2^k m - 1 (m odd) after its k odd steps and the k' halvings that follow.

k shortcut steps lead to 3^k m - 1, and k' halvings to the next odd number. A class (k, k') holds a share 2^-(k + k') of the
odd numbers; models learn whole classes, one after the other (Charton and Narayanan 2025, arXiv 2511.10811: 99.7% of all in
bases 24 and 32, 37% in base 11, 25% in base 3), so the table by class says more than the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from treadle.collatz.arithmetic import number
from treadle.collatz_tasks.numbers import GOLDEN, digit_count, digits, split_of
from treadle.collatz_tasks.settings import LongStepKeys
from treadle.data.batch import Batch
from treadle.data.generated import SPLITS, GeneratedDataset
from treadle.data.order import key, mix64
from treadle.models.base import Model
from treadle.models.encoder_decoder import SOURCE
from treadle.objectives.base import Metric
from treadle.objectives.next_token import NextToken

U64 = np.uint64
POWERS_OF_THREE = np.array([3**k for k in range(41)], dtype=U64)
CLASSES = 8  # k and k' from 1 to 8 have a place of their own in the table, the rest one together
NUMBER, CLASS = "number", "class"
MASTERED, FEWEST = 0.99, 10  # a class is mastered when of ten rows or more this share is exact


def long_step(n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Odd n, uint64 [B], up to 2^40 -> (the odd number after the long step, k, k')."""
    k = _trailing_zeros(n + U64(1))
    top = POWERS_OF_THREE[k] * ((n + U64(1)) >> k.astype(U64)) - U64(1)
    halvings = _trailing_zeros(top)
    return top >> halvings.astype(U64), k, halvings


def _trailing_zeros(x: np.ndarray) -> np.ndarray:
    lowest = (x & (~x + U64(1))).astype(np.float64)  # a power of two, exact
    return np.log2(lowest).astype(np.int64)


class LongSteps(GeneratedDataset):
    """Digits of an odd number, highest first, and the digits to write; both padded with zeros to a fixed width."""

    Config = LongStepKeys
    name = "collatz_long_step"
    task: LongStepKeys
    evaluation_rows = 4096

    def __init__(self, task: Any = None, seed: int = 0, split: str = "train", seq_len: int | None = None) -> None:
        super().__init__(task, seed, split)
        self.largest, self.split_number = number(self.task.largest), SPLITS.index(split)
        self.key = key(self.seed, 0x10A65)
        k = self.largest.bit_length() - 1
        self.source_length = digit_count(self.largest, self.task.base)
        # The largest result of all: 3^k m - 1 halved once, with 2^k m the largest there is.
        self.seq_len = digit_count(3**k * (self.largest >> k) // 2 + 3**k, self.task.base)

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Odd numbers of this split, uniform below `largest`; uint64 [B]."""
        found = np.zeros(len(rows), U64)
        wrong, attempt = np.arange(len(rows)), 0
        while len(wrong):
            with np.errstate(over="ignore"):
                words = mix64(mix64(rows[wrong].astype(U64) * U64(GOLDEN)) + U64(key(self.key, attempt)))
            found[wrong] = (words % U64((self.largest + 1) // 2)) * U64(2) + U64(1)
            # The split is that of its place among the odd numbers.
            others = split_of(found[wrong] >> U64(1), np.zeros(len(wrong), U64)) != self.split_number
            wrong, attempt = wrong[others], attempt + 1
        return found

    def generate(self, rows: np.ndarray) -> Batch:
        n = self.numbers(rows)
        after, k, halvings = long_step(n)
        nothing, base = np.zeros_like(n), self.task.base
        source, target = (torch.from_numpy(np.ascontiguousarray(digits(x, nothing, base, length)[:, ::-1]))
                          for x, length in ((n, self.source_length), (after, self.seq_len)))  # fmt: skip
        begin = torch.full_like(target[:, :1], base)
        classes = np.minimum(k, CLASSES + 1) * (CLASSES + 2) + np.minimum(halvings, CLASSES + 1)
        extras: dict[str, Tensor] = {SOURCE: source, NUMBER: torch.from_numpy(n.view(np.int64)), CLASS: torch.from_numpy(classes)}
        return Batch.from_ids(torch.cat([begin, target[:, :-1]], 1), labels=target, extras=extras)

    def model_keys(self) -> dict[str, Any]:
        return {"vocab_size": self.task.base + 1, "source_length": self.source_length}

    def describe(self) -> str:
        rows = "rows made as they are wanted" if self.split == "train" else f"{self.evaluation_rows:,} rows never trained on"
        return f"{rows}: odd numbers to {self.task.largest} in base {self.task.base}, {self.source_length} digits to {self.seq_len}"


class LongStep(NextToken):
    """Cross-entropy of the digits; a row is exact when all of them are. The likeliest digit at each place, with what stands
    before it given, is right everywhere if and only if greedy decoding writes exactly this row."""

    Config = LongStepKeys
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": Metric(),
        "accuracy": Metric(lower_is_better=False, format=".2%", label="digits"),
        "exact": Metric(lower_is_better=False, format=".2%"),
        "classes_mastered": Metric(lower_is_better=False, format=".0f", label="classes mastered"),
        "classes_seen": Metric(shown=False),
        "mastered_share": Metric(lower_is_better=False, format=".2%", label="their share of all numbers"),
        **{f"exact_{k}_{h}": Metric(lower_is_better=False, shown=False) for k in range(1, CLASSES + 1) for h in range(1, CLASSES + 1)},
    }
    ranking_metric = "exact"
    training_line: ClassVar[tuple[str, ...]] = ("loss",)
    evaluation_line: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "exact", "classes_mastered")

    def evaluation_sums(self, model: Model, batch: Batch) -> dict[str, Any]:
        logits = model(batch).logits
        assert logits is not None
        return self._sums(logits, batch)

    def _sums(self, logits: Tensor, batch: Batch) -> dict[str, Any]:
        assert batch.labels is not None
        nats = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), batch.labels, reduction="none").double()
        right = logits.argmax(-1) == batch.labels
        exact, classes = right.all(1), batch.extras[CLASS]
        found: dict[str, Any] = {"nats": nats.sum(), "labels": batch.counts["labels"], "correct": right.sum(), "exact": exact.sum(),
                                 "rows": batch.counts["rows"]}  # fmt: skip
        size = (CLASSES + 2) ** 2
        counts = torch.bincount(classes, minlength=size)
        of_class = torch.bincount(classes, weights=exact.double(), minlength=size)
        for k in range(1, CLASSES + 1):
            for h in range(1, CLASSES + 1):
                place = k * (CLASSES + 2) + h
                found |= {f"rows_{k}_{h}": counts[place], f"exact_{k}_{h}": of_class[place]}
        return found

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        found = {"loss": sums["nats"] / max(1.0, sums["labels"]), "accuracy": sums["correct"] / max(1.0, sums["labels"]),
                 "exact": sums["exact"] / max(1.0, sums["rows"])}  # fmt: skip
        mastered, seen, share = 0, 0, 0.0
        for k in range(1, CLASSES + 1):
            for h in range(1, CLASSES + 1):
                rows = sums[f"rows_{k}_{h}"]
                if not rows:
                    continue
                found[f"exact_{k}_{h}"] = sums[f"exact_{k}_{h}"] / rows
                if rows >= FEWEST:
                    seen += 1
                    if found[f"exact_{k}_{h}"] >= MASTERED:
                        mastered, share = mastered + 1, share + 2.0 ** -(k + h)
        return found | {"classes_mastered": mastered, "classes_seen": seen, "mastered_share": share}

    def training_metrics(self, sums: Any) -> dict[str, float]:
        return {}

    def samples(self, model: Model, dataset: Any, count: int) -> tuple[list[dict[str, str]], dict[str, float]]:
        return [{"prompt": "", "text": self.sample(model, dataset, "", 0, 0)}][:count], {}

    def sample(self, model: Model, dataset: Any, prompt: str, tokens: int, seed: int) -> str:
        """The table by class, and a few rows that are written wrong."""
        sums: dict[str, float] = {}
        wrong: list[str] = []
        for batch in dataset.in_sequence(256):
            batch = batch.to(model.device)
            with torch.no_grad():
                logits = model(batch).logits
                assert logits is not None
                found, guess = {name: float(value) for name, value in self._sums(logits, batch).items()}, logits.argmax(-1)
            sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            bad = (guess != batch.labels).any(1).nonzero()[:, 0].tolist()
            wrong += [_shown(batch, guess, row) for row in bad[: 10 - len(wrong)]]
        return class_table(self.compute_metrics(sums)) + ("\nwritten wrong:\n" + "\n".join(wrong) + "\n" if wrong else "")


def class_table(metrics: Mapping[str, float]) -> str:
    """Shares written exactly, by k (down) and k' (across); "-" where the evaluation has no row."""
    lines = ["exact by class: k odd steps (down), k' halvings (across)", "   k" + "".join(f"{h:>8}" for h in range(1, CLASSES + 1))]
    for k in range(1, CLASSES + 1):
        cells = [metrics.get(f"exact_{k}_{h}") for h in range(1, CLASSES + 1)]
        lines.append(f"{k:>4}" + "".join(f"{'-' if cell is None else f'{cell:.1%}':>8}" for cell in cells))
    return "\n".join(lines) + "\n"


def _shown(batch: Batch, guess: Tensor, row: int) -> str:
    assert batch.labels is not None
    written, wanted = (" ".join(map(str, ids[row].tolist())) for ids in (guess, batch.labels))
    return f"{int(batch.extras[NUMBER][row])}: wanted {wanted}, written {written}"
