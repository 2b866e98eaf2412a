"""What anyone gets without a model: uniform, unigram and bigram predictors, on the same labels in the same unit."""

from __future__ import annotations

import numpy as np

from treadle.data.batch import IGNORE
from treadle.data.dataset import TokenDataset

FIT_TOKENS = 20_000_000  # counts are steady long before; keeps a large corpus from being read twice


def baseline_sums(train: TokenDataset, held_out: TokenDataset) -> dict[str, dict[str, float]]:
    """nats, labels and bytes of each baseline, fitted on the training text and added up over all held-out labels.

    unigram: (count + 1) / (N + V). bigram: pair counts mixed with the unigram, the mixture weight of each context
    n / (n + V / 8), so that rare contexts lean on the unigram.
    """
    tokenizer = held_out.tokenizer
    vocabulary = tokenizer.vocab_size
    ids = _training_ids(train)
    unigram = (np.bincount(ids, minlength=vocabulary) + 1.0) / (len(ids) + vocabulary)
    codes = ids[:-1].astype(np.int64) * vocabulary + ids[1:]
    pairs, counts = np.unique(codes, return_counts=True)
    context = np.bincount(ids[:-1], minlength=vocabulary)
    sums = {name: {"nats": 0.0, "correct": 0.0, "top5": 0.0, "labels": 0.0, "bytes": 0.0}
            for name in ("uniform", "unigram", "bigram")}  # fmt: skip
    lengths = np.asarray(tokenizer.byte_lengths, dtype=np.int64)
    for batch in held_out.in_sequence(64):
        assert batch.labels is not None
        scored = (batch.labels != IGNORE).numpy()
        label, before = batch.labels.numpy()[scored], batch.input_ids.numpy()[scored]
        code = before * vocabulary + label
        at = np.minimum(np.searchsorted(pairs, code), len(pairs) - 1)
        pair = np.where(pairs[at] == code, counts[at], 0) if len(pairs) else np.zeros(len(code))
        seen = context[before]
        trust = seen / (seen + vocabulary / 8)
        bigram = trust * pair / np.maximum(seen, 1) + (1 - trust) * unigram[label]
        nats = {
            "uniform": np.full(len(label), np.log(vocabulary)),
            "unigram": -np.log(unigram[label]),
            "bigram": -np.log(bigram),
        }
        for name, values in nats.items():
            sums[name]["nats"] += float(values.sum())
            sums[name]["labels"] += len(label)
            sums[name]["bytes"] += float(lengths[label].sum())
    return sums


def _training_ids(train: TokenDataset) -> np.ndarray:
    parts, held = [], 0
    for tokens in train.sets:
        for shard in tokens.shards:
            if held >= FIT_TOKENS:
                break
            parts.append(np.asarray(shard.ids[: FIT_TOKENS - held], dtype=np.int64))
            held += len(parts[-1])
    return np.concatenate(parts)
