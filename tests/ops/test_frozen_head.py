"""The losses over a head that is not trained, as with adapters: the same loss and gradient of the rest, none of the head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treadle.ops.cross_entropy import linear_cross_entropy
from treadle.ops.divergence import linear_divergence

V, D, N = 300, 24, 200


def loss(kind: str, hidden: Tensor, weight: Tensor) -> Tensor:
    labels = torch.arange(N) % V
    labels[::7] = -100
    if kind == "cross_entropy":
        return linear_cross_entropy(hidden[None], weight, labels[None])
    other = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    return linear_divergence(hidden[None], weight, other[None], weight.detach().flip(0), labels[None], 2.0)[0]


@pytest.mark.parametrize("kind", ["cross_entropy", "divergence"])
def test_a_frozen_head_gets_no_gradient_and_costs_none(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    found = []
    for trained in (True, False):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        total = loss(kind, x, w)
        of_hidden, of_head = total.grad_fn.saved_tensors  # type: ignore[union-attr]
        assert of_hidden.shape == (N, D) and (of_head is not None) is trained
        total.backward()  # type: ignore[no-untyped-call]
        found.append((total.detach(), x.grad))
        assert (w.grad is not None) is trained
    (one, slope), (two, again) = found
    assert torch.equal(one, two) and torch.equal(slope, again)  # type: ignore[arg-type]
