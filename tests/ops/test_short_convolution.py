"""The compiled short convolution against its equation: values and gradients."""

from __future__ import annotations

import pytest
import torch

from treadle.ops.native import library
from treadle.ops.short_convolution import short_convolution, short_convolution_reference

pytestmark = pytest.mark.skipif(library("convolution") is None, reason="no C compiler on this machine")
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3, -1], [0] * 12])


@pytest.mark.parametrize("channels, size, length", [(5, 4, 12), (64, 4, 12), (130, 3, 12), (16, 16, 12), (7, 4, 2), (3, 1, 1)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_values_and_gradients(channels: int, size: int, length: int, packed: bool, silu: bool) -> None:
    torch.manual_seed(0)
    given = [t.requires_grad_() for t in (torch.randn(2, length, channels), torch.randn(channels, size))]
    documents, slope, found = DOCUMENTS[:, :length] if packed else None, torch.randn(2, length, channels), []
    for way in (short_convolution, short_convolution_reference):
        y = way(*given, documents, silu)
        found.append([y, *torch.autograd.grad((y * slope).sum(), given)])
    assert type(found[0][0].grad_fn).__name__ == "_ShortConvolutionBackward"
    for mine, wanted in zip(*found):
        torch.testing.assert_close(mine, wanted, atol=2e-5, rtol=1e-5)
    if not silu:
        assert torch.equal(found[0][0], found[1][0])


def test_threads_change_no_bit() -> None:
    given, found, before = [torch.randn(3, 200, 90).requires_grad_(), torch.randn(90, 4).requires_grad_()], [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = short_convolution(*given, None, True)
            found.append([y, *torch.autograd.grad(y.square().sum(), given)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))
