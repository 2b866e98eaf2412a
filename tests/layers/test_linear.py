"""Layers of one input as one product, where that is the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from treadle.layers.linear import outputs
from treadle.ops.planned import planned_for


class Hooked(nn.Linear):
    """Another class: its forward is its own."""


@pytest.mark.parametrize("biased", [(False, False), (True, True), (True, False)])
def test_one_product_of_several_layers(biased: tuple[bool, bool]) -> None:
    """As training on a GPU takes it, here on the CPU: the layers' values and gradients, in views of one tensor; a layer with a bias and
    one without, or a class of one's own, stay apart."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, width, bias=bias) for width, bias in zip((8, 20), biased)]
    found = []
    for joined in (True, False):
        x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if joined:
            with planned_for("cuda"):
                parts = outputs(x, *layers)
                apart = outputs(x, layers[0], Hooked(12, 4))
            assert (parts[0]._base is not None and parts[0]._base is parts[1]._base) is (biased[0] == biased[1])
            assert apart[0]._base is None or apart[0]._base is not apart[1]._base
        else:
            parts = tuple(layer(x) for layer in layers)
        parameters = [x, *(p for layer in layers for p in layer.parameters())]
        found.append([*parts, *torch.autograd.grad(sum((part.square().sum() for part in parts), torch.zeros(())), parameters)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_decoding_reads_the_weights_in_place() -> None:
    """Without gradients nothing is laid out anew: for one token the copy would cost more than the products."""
    layers = [nn.Linear(12, 8, bias=False) for _ in range(2)]
    with planned_for("cuda"), torch.no_grad():
        parts = outputs(torch.randn(1, 1, 12), *layers)
    assert parts[0]._base is None or parts[0]._base is not parts[1]._base
