"""Predict the next token: cross-entropy over labels, plus whatever losses the model itself brings. Bits per byte, perplexity
and accuracy are here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from treadle.data.base import Dataset
from treadle.data.batch import IGNORE, Batch
from treadle.data.dataset import TokenDataset
from treadle.errors import ConfigError
from treadle.generation.decode import generate_text
from treadle.generation.text_checks import sample_texts
from treadle.models.base import LM_HEAD, Model
from treadle.objectives.base import Losses, LossTerm, Metric, Objective
from treadle.objectives.sums import LossSums
from treadle.objectives.text_baselines import baseline_sums
from treadle.ops.cross_entropy import chunk_of, linear_cross_entropy
from treadle.text.base import Tokenizer

LN2 = math.log(2)
PROMPTS = ("\n", "The ", "She ", "It was ", "In the ")
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 150, 0.8
UNITS = ("labels", "tokens", "rows", "documents")


class NextToken(Objective):
    """Cross-entropy of the next token, with the head inside so that all logits never exist at once.

    tokenizer: says how many bytes a label stands for where the data does not count them already.
    """

    headline = "next_token"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": Metric(),
        "bpb": Metric(usual=("<", 1.5), label="bpb"),
        "perplexity": Metric(usual=("<", 20.0)),
        "accuracy": Metric(lower_is_better=False, usual=(">", 0.30)),
        "top5_accuracy": Metric(lower_is_better=False, usual=(">", 0.60)),
        "labels": Metric(shown=False),
        "bytes": Metric(shown=False),
        "utf8_validity": Metric(lower_is_better=False, usual=(">", 0.95)),
        "distinct_1": Metric(lower_is_better=False),
        "distinct_2": Metric(lower_is_better=False),
    }
    ranking_metric = "bpb"
    training_line: ClassVar[tuple[str, ...]] = ("loss", "bpb")
    evaluation_line: ClassVar[tuple[str, ...]] = ("loss", "bpb", "accuracy")

    def __init__(self, task: Any = None, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(task)
        self._lengths: Tensor | None = None
        self._know(tokenizer)

    def _know(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is not None:
            self._lengths = torch.from_numpy(np.asarray(tokenizer.byte_lengths, dtype=np.int64))

    def prepare(self, model: Model, dataset: Dataset, device: torch.device) -> None:
        if LM_HEAD not in model.heads():
            raise ConfigError(f"the model {model.arch} predicts no tokens: it has no self.head = nn.Linear(width, vocab_size); add it, or name the "
                              "objective that the model is trained for: --objective FILE.py:CLASS")  # fmt: skip
        tokenizer = dataset.tokenizer
        self._know(tokenizer)
        if tokenizer is not None and model.vocab_size < tokenizer.vocab_size:
            raise ConfigError(f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's "
                              f"{tokenizer.vocab_size}; leave it out or make it larger")  # fmt: skip

    def __call__(self, model: Model, batch: Batch) -> Losses:
        if batch.labels is None:
            raise ConfigError("the batch has no labels; make it with Batch.for_training(ids)")
        out = model.hidden(batch)
        assert out.hidden is not None
        losses = {self.headline: LossTerm(linear_cross_entropy(*model.linear_head(out.hidden), batch.labels, model.logit_softcap), "labels")}
        for name, (total, unit) in out.losses.items():
            losses[name] = LossTerm(total, known_unit(unit))
        return Losses(losses, out.stats)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Bytes too: text datasets count them while they make a batch, where it costs the step no time."""
        if "bytes" in batch.counts or self._lengths is None or batch.labels is None:
            return batch.counts
        labels = batch.labels.cpu()
        return {**batch.counts, "bytes": int(self._lengths[labels[labels != IGNORE]].sum())}

    # ---- evaluation ----

    def evaluation_sums(self, model: Model, batch: Batch) -> dict[str, Any]:
        """nats, correct, top5, labels and bytes of one batch, added up in fp64."""
        out = model.hidden(batch)
        assert out.hidden is not None and batch.labels is not None
        head = model.heads()[LM_HEAD]
        scored = batch.labels != IGNORE
        hidden, labels = out.hidden[scored], batch.labels[scored]
        nats = correct = top5 = torch.zeros((), dtype=torch.float64, device=hidden.device)
        chunk = chunk_of(model.vocab_size, hidden.device)
        for start in range(0, len(labels), chunk):
            logits = head(hidden[start : start + chunk]).float()
            target = labels[start : start + chunk, None]
            own = logits.gather(1, target)
            nats = nats + (logits.logsumexp(-1) - own[:, 0]).double().sum()
            rank = (logits > own).sum(-1)  # how many tokens score higher
            correct, top5 = correct + (rank < 1).sum(), top5 + (rank < 5).sum()
        size = self.counts(batch).get("bytes", 0)
        return {"nats": nats, "correct": correct, "top5": top5, "labels": len(labels), "bytes": size}

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """bpb = nats / ln 2 / bytes of the scored tokens; left out where nobody knows their bytes."""
        labels = max(1.0, sums["labels"])
        loss = sums["nats"] / labels
        known = {"bpb": sums["nats"] / LN2 / sums["bytes"]} if sums["bytes"] else {}
        return {
            "loss": loss,
            **known,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": sums["correct"] / labels,
            "top5_accuracy": sums["top5"] / labels,
            "labels": sums["labels"],
            "bytes": sums["bytes"],
        }

    def training_metrics(self, sums: LossSums) -> dict[str, float]:
        loss = sums.means.get(self.headline, math.nan)
        found = {}
        if sums.counts.get("bytes"):
            found["bpb"] = sums.totals[self.headline] / LN2 / sums.counts["bytes"]
        return {**found, "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan}

    # ---- samples and baselines ----

    def sample(self, model: Model, dataset: Dataset, prompt: str, tokens: int, seed: int) -> str:
        if not model.capabilities.decodes or dataset.tokenizer is None or tokens == 0:
            return ""
        tokens = fitting(model, dataset.tokenizer, prompt or "\n", tokens)
        text = generate_text(model, dataset.tokenizer, prompt or "\n", tokens, seed=seed, temperature=SAMPLE_TEMPERATURE)
        return prompt + text

    def samples(self, model: Model, dataset: Dataset, count: int) -> tuple[list[dict[str, str]], dict[str, float]]:
        if not model.capabilities.decodes or dataset.tokenizer is None:
            return super().samples(model, dataset, count)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
        tokens = min(fitting(model, dataset.tokenizer, prompt, SAMPLE_TOKENS) for prompt in prompts)
        return sample_texts(model, dataset.tokenizer, prompts, tokens, temperature=SAMPLE_TEMPERATURE)

    def baselines(self, train: Dataset, held_out: Dataset) -> dict[str, dict[str, float]]:
        """uniform, unigram and bigram predictors, on the same labels in the same unit."""
        if not isinstance(train, TokenDataset) or not isinstance(held_out, TokenDataset):
            return {}
        found = {name: self.compute_metrics(sums) for name, sums in baseline_sums(train, held_out).items()}
        return {name: {k: v for k, v in metrics.items() if k in ("loss", "bpb")} for name, metrics in found.items()}


def fitting(model: Model, tokenizer: Tokenizer, prompt: str, tokens: int) -> int:
    """How many of `tokens` new tokens the model has room for after a prompt; 0 where the prompt alone is too long."""
    if model.longest_row is None:
        return tokens
    return max(0, min(tokens, model.longest_row - len(tokenizer.prompt_ids(prompt))))


def known_unit(name: str) -> str:
    """`name`; ConfigError when no loss of a model may be counted in it."""
    if name not in UNITS:
        raise ConfigError(f"a model's loss counts {name!r}; it must be {', '.join(UNITS)}")
    return name
