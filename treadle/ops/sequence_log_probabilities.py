"""How likely a model finds whole sequences: log-probabilities of labels, added up by document, without ever holding all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from treadle.ops.cross_entropy import IGNORE, chunk_of


def _log_probabilities(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
    """hidden [N, D], labels [N] -> log softmax(hidden weight^T)[label], fp32 [N]; 0 where no label is."""
    logits = F.linear(hidden, weight).float()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    found = logits.log_softmax(-1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    return torch.where(labels == IGNORE, 0.0, found)


def sequence_log_probabilities(
    hidden: Tensor, weight: Tensor, labels: Tensor, documents: Tensor, count: int, scored_count: int, softcap: float | None = None
) -> Tensor:
    """hidden [B, T, D], weight [V, D], labels [B, T] (-100: not scored), documents [B, T] (which document of its row a position
    belongs to, -1 for padding) -> fp32 [B, count]: of each of the first `count` documents of each row, the sum of the log-probabilities
    of its labels. scored_count: how many labels there are, known on the host, so that nothing waits for a GPU. softcap c: logits z become
    c tanh(z / c).

    Logits exist for some positions at a time; where gradients are wanted they are computed again in the backward pass. The sums are
    over a fixed order, so that they are the same bits each time on a GPU too.
    """
    chunk = chunk_of(weight.shape[0], hidden.device)
    # Some positions without a label too, so that products have few different shapes: oneDNN keeps code for each (5 MB more a step).
    unit = min(chunk, 256)
    taken = min(-(-scored_count // unit) * unit, labels.numel())
    places = (labels != IGNORE).flatten().to(torch.uint8).argsort(descending=True, stable=True)[:taken]
    inputs, targets = hidden.flatten(0, 1).index_select(0, places), labels.flatten()[places]
    found = [checkpoint(_log_probabilities, inputs[at : at + chunk], weight, targets[at : at + chunk], softcap, use_reentrant=False)
             for at in range(0, taken, chunk)]  # fmt: skip
    each = hidden.new_zeros(labels.numel(), dtype=torch.float32)
    if found:
        each = each.index_copy(0, places, torch.cat(found))
    each = each.view(labels.shape)
    return torch.stack([torch.where(documents == number, each, 0.0).sum(-1) for number in range(count)], -1)
