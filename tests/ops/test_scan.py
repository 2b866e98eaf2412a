"""The gated recurrence: every way of computing it agrees with autograd through a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from treadle.ops.native import library
from treadle.ops.scan import scan, scan_reference

BACKENDS = ["loop", pytest.param("native", marks=pytest.mark.skipif(library("scan") is None, reason="no C compiler here"))]


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("shape", [(2, 50, 70), (3, 1, 64), (1, 33, 5), (2, 129, 128)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_all_gradients(backend: Any, shape: tuple[int, int, int], start: bool) -> None:
    torch.manual_seed(0)
    given = [torch.rand(shape), torch.randn(shape), torch.randn(shape[0], shape[2]) if start else None]
    found = []
    for function in (scan_reference, lambda *a: scan(*a, backend=backend)):
        leaves = [t.clone().requires_grad_() if t is not None else None for t in given]
        out = function(*leaves)
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        found.append([out.detach(), *(t.grad for t in leaves if t is not None)])
    for a, b in zip(*found):
        assert (a - b).abs().max() <= 2e-6 * max(1.0, float(a.abs().max()))


def test_strided_inputs_are_taken() -> None:
    gate, value = torch.rand(4, 6, 20).transpose(0, 1), torch.randn(6, 4, 40)[:, :, ::2]
    assert torch.allclose(scan(gate, value), scan_reference(gate, value), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_those_of_two_roundings_a_position(backend: Any) -> None:
    """Decoding token by token gives the bits of the whole: rn(rn(f h) + i), whichever way it is computed."""
    torch.manual_seed(1)
    gate, value, start = torch.rand(2, 40, 67), torch.randn(2, 40, 67), torch.randn(2, 67)
    assert torch.equal(scan(gate, value, start, backend), scan_reference(gate, value, start))
