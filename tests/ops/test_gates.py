"""The compiled gates against their equations: values and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from treadle.ops import gates
from treadle.ops.native import library

pytestmark = pytest.mark.skipif(library("gates") is None, reason="no C compiler on this machine")


def agree(ours: Callable[..., Any], theirs: Callable[..., Any], inputs: list[torch.Tensor], *more: Any) -> None:
    found = []
    for way in (ours, theirs):
        given = [t.clone().requires_grad_() for t in inputs]
        out = way(*given, *more)
        torch.manual_seed(1)
        found.append([out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), given)])
    assert type(found[0][0].grad_fn) is not type(found[1][0].grad_fn)  # the kernels are used
    for mine, wanted in zip(*found):
        torch.testing.assert_close(mine, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()), rtol=1e-5)


@pytest.mark.parametrize("width", [5, 16, 61, 64, 150])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gated_scan(width: int, bounded: bool, packed: bool) -> None:
    torch.manual_seed(0)
    starts = torch.rand(3, 20) < 0.2 if packed else None
    inputs = [torch.randn(3, 20, width) * 3, torch.randn(3, 20, width) * 3, *([torch.rand(width)] if bounded else [])]
    more = (starts,) if bounded else (None, starts)
    agree(gates.gated_scan, gates.gated_scan_reference, inputs, *more)


@pytest.mark.parametrize("kind", gates.NORM_KINDS)
@pytest.mark.parametrize("heads, width", [(1, 5), (4, 16), (2, 61), (3, 100)])
def test_gated_norm(heads: int, width: int, kind: gates.NormKind) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 70, heads * width) + 5.0, torch.randn(2, 70, heads * width) * 4, torch.rand(heads * width) + 0.5]
    if kind != "centred":
        return agree(gates.gated_norm, gates.gated_norm_reference, inputs, heads, 1e-6, kind)
    ours, theirs = (lambda x, g, w, b, way=way: way(x, g, w, heads, 1e-6, kind, b) for way in (gates.gated_norm, gates.gated_norm_reference))
    agree(ours, theirs, [*inputs, torch.randn(heads * width)])


@pytest.mark.parametrize("width", [3, 64, 85])
def test_gated_product(width: int) -> None:
    agree(gates.gated_product, gates.gated_product_reference, [torch.randn(3, 7, 2 * width) * 20])


def test_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    x, gate, weight = torch.randn(4, 300, 96), torch.randn(4, 300, 96), torch.rand(96)
    given, found, before = [t.requires_grad_() for t in (x, gate, weight)], [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = gates.gated_norm(gates.gated_scan(x, gate, weight), gates.gated_product(torch.cat([x, gate], -1)), weight, 2, 1e-6)
            found.append([y, *torch.autograd.grad(y.square().sum(), given)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_gradient_that_is_not_dense() -> None:
    """That of a plain sum is one number at all places; the kernels get a copy, which has to live until they are done."""
    torch.manual_seed(0)
    for ours, shapes in (
        (gates.gated_product, [(2, 3, 64)]),
        (lambda x, g, w: gates.gated_norm(x, g, w, 2, 1e-6), [(2, 3, 32), (2, 3, 32), (32,)]),
        (gates.gated_scan, [(2, 3, 32), (2, 3, 32)]),
    ):
        given = [torch.randn(shape, requires_grad=True) for shape in shapes]
        out = ours(*given)
        dense = torch.autograd.grad(out, given, torch.ones_like(out), retain_graph=True)
        for grad in (torch.ones(()).expand(out.shape), torch.ones(out.shape[::-1]).permute(2, 1, 0)):
            assert all(torch.equal(a, b) for a, b in zip(dense, torch.autograd.grad(out, given, grad, retain_graph=True)))
