"""Byte models on packed and padded rows: each document is what it is alone, in logits and in gradients; what the presets need."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import treadle
from tests.conftest import treadle as command
from tests.models.rows import DOCUMENTS, doc_ids, ids
from treadle.data.batch import IGNORE, Batch
from treadle.objectives.next_token import NextToken

SHAPES = {
    "flat": ("hgrn_bit", {"hidden_size": 48, "num_layers": 2}),
    "flat, convolution": ("hgrn_bit", {"hidden_size": 48, "num_layers": 2, "convolution_size": 4}),
    "one stage": ("hnet", {"hidden_sizes": [32, 48], "num_blocks": [[1, 0, 1], [1]]}),
    "two stages": ("hnet", {"hidden_sizes": [24, 32, 48], "num_blocks": [[1, 0, 1], [1, 0, 1], [1]], "convolution_size": 4}),
}


def graded(model: Any, batches: list[Batch], labels: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """(logits of each batch, gradients of the mean loss over all of them)."""
    model.zero_grad()
    logits = []
    for batch in batches:
        (NextToken()(model, batch).losses["next_token"].total / labels).backward()
        with torch.no_grad():
            logits.append(model(batch).logits)
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SHAPES)
def test_documents_in_a_padded_row_are_the_documents_alone(name: str) -> None:
    arch, keys = SHAPES[name]
    model = treadle.build(arch, vocab_size=256, **keys).train()
    tokens, labels = ids(1, 30), torch.full((1, 30), IGNORE)
    for start, stop in DOCUMENTS:
        labels[0, start : stop - 1] = tokens[0, start + 1 : stop]
    count = sum(stop - start - 1 for start, stop in DOCUMENTS)
    alone = [Batch.from_ids(tokens[:, a:b], labels=labels[:, a:b]) for a, b in DOCUMENTS]
    one, gradients = graded(model, [Batch.from_ids(tokens, doc_ids=doc_ids(), labels=labels)], count)
    apart, wanted = graded(model, alone, count)
    for logits, (start, stop) in zip(apart, DOCUMENTS):
        assert (one[0][:, start:stop] - logits).abs().max() <= 1e-6
    assert gradients.keys() == wanted.keys()
    for parameter, gradient in gradients.items():
        assert (gradient - wanted[parameter]).abs().max() <= 1e-6 * max(1.0, float(gradient.abs().max())), parameter


@pytest.mark.parametrize("preset, batch, memory", [("slm_base", 8, "8GiB"), ("hnet_bit_2stage", 4, "24GiB")])
def test_the_presets_fit_where_they_are_said_to(preset: str, batch: int, memory: str) -> None:
    arch = "hgrn_bit" if preset == "slm_base" else "hnet"
    done = command("plan", "austen", "--model.arch", arch, "--model.preset", preset, "--tokenizer", "byte", "--batch_size", batch,
                   "--memory", memory)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
