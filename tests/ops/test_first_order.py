"""A gradient that is written out without one of its own says so when it is differentiated again; others are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from treadle.ops import fused, gates, memories, stream_kernels, streams, ternary_training
from treadle.ops.attention import block_causal
from treadle.ops.cross_entropy import linear_cross_entropy
from treadle.ops.divergence import linear_divergence
from treadle.ops.gelu import gelu_mlp
from treadle.ops.linear import linears
from treadle.ops.residual import residual_sum
from treadle.ops.rms_norm import add_rms_norm, keep_rms_norm, rms_norm
from treadle.ops.rotations import cayley
from treadle.ops.scan import scan
from treadle.ops.short_convolution import short_convolution
from treadle.ops.swiglu import swiglu
from treadle.ops.ternary import ternary_linear

N, D = 3, 16
REFUSED = "no second derivative"
LABELS = torch.arange(2 * N).view(2, N)


def stream(x: Tensor, weight: Tensor, *, write: bool = False) -> Tensor:
    read = stream_kernels.read_streams(x, weight, torch.zeros(24), torch.ones(3), None, "sinkhorn", 1e-6)
    return stream_kernels.write_streams(read, torch.ones(N, D)) if write else read.u


# Functions, and the shapes of their inputs.
ONCE: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms norm": (rms_norm, [(2, N, D), (D,)]),
    "rms norm beside": (lambda x, w: keep_rms_norm(x, w)[1], [(2, N, D), (D,)]),
    "rms norm of a sum": (lambda x, y, w: add_rms_norm(x, y, w)[1], [(2, N, D), (2, N, D), (D,)]),
    "swiglu": (swiglu, [(2, N, D), (8, D), (8, D), (D, 8)]),
    "gelu": (gelu_mlp, [(2, N, D), (8, D), (D, 8), (8,), (D,)]),
    "linears": (lambda x, *ws: sum(linears(x, *ws)), [(2, 100, D), (8, D), (8, D)]),
    "attention": (lambda *x: block_causal(*x, ((N,),) * 2), [(2, 2, N, 8)] * 3),
    "cross-entropy": (lambda h, w: linear_cross_entropy(h, w, LABELS), [(2, N, D), (8, D)]),
    "divergence": (lambda h, w: linear_divergence(h, w, torch.ones(2, N, D), torch.ones(8, D), LABELS, 1.0)[0], [(2, N, D), (8, D)]),
    "scan": (scan, [(2, N, D)] * 2),
    "gated scan": (gates.gated_scan, [(2, N, D)] * 2),
    "gated norm": (lambda x, g, w: gates.gated_norm(x, g, w, 2, 1e-6), [(2, N, D), (2, N, D), (D,)]),
    "gated product": (gates.gated_product, [(2, N, 2 * D)]),
    "short convolution": (lambda x, w: short_convolution(x, w, silu=True), [(2, N, D), (D, 4)]),
    "recurrence": (lambda q, k, v, d: memories.recurrence("sum", q, k, v, -d.square())[0], [(2, 2, N, 8)] * 3 + [(2, 2, N)]),
    "ternary": (ternary_linear, [(2, N, D), (8, D)]),
    "normed ternary": (lambda x, g, w: ternary_training.normed_ternary_linear(x, g, w, 1e-6), [(2, N, D), (D,), (8, D)]),
    "reading streams": (stream, [(N, 4, D), (24, 4 * D)]),
    "writing streams": (lambda x, w: stream(x, w, write=True), [(N, 4, D), (24, 4 * D)]),
    "norm before a router": (lambda x, w: streams.rms_norm_linear(x, w, 1e-6), [(N, D), (8, D)]),
    "cayley": (lambda p: cayley(p, 4), [(N, 6)]),
}
TWICE: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "reading": (streams.read, [(N, 4, D), (N, 4), (N, 4, 4)]),
    "writing": (streams.write, [(N, 4, D), (N, 4), (N, D)]),
}


def leaves(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.skipif(fused.kernels() is None, reason="no C compiler")
@pytest.mark.parametrize("name", ONCE)
def test_a_second_derivative_is_refused(name: str) -> None:
    function, shapes = ONCE[name]
    given = leaves(shapes)
    plain = torch.autograd.grad(function(*given).sum(), given)
    for power in (1, 2):  # the gradient that comes in has none itself, or has
        grads = torch.autograd.grad(function(*given).pow(power).sum(), given, create_graph=True)
        assert power == 2 or all(torch.equal(a, b) for a, b in zip(plain, grads))
        for grad in grads:
            with pytest.raises(RuntimeError, match=REFUSED):
                grad.sum().backward(retain_graph=True)
            for leaf in given:  # asked for alone, what does not lead to it is left out
                with pytest.raises(RuntimeError, match=REFUSED):
                    torch.autograd.grad(grad.sum(), leaf, retain_graph=True, allow_unused=True)
                with pytest.raises(RuntimeError, match=REFUSED):
                    grad.sum().backward(retain_graph=True, inputs=[leaf])


@pytest.mark.skipif(fused.kernels() is None, reason="no C compiler")
@pytest.mark.parametrize("again", [False, True])
def test_a_second_derivative_is_refused_in_a_network(again: bool) -> None:
    """Also where parameters and activations in the middle are asked for, and blocks are run again for backward."""
    x, norm, first, second = leaves([(2, N, D), (D,), (8, D), (D, 8)])
    taken: list[Tensor] = []

    def block(x: Tensor, norm: Tensor) -> Tensor:
        taken.append(x.sin())
        return gelu_mlp(rms_norm(taken[-1], norm), first, second, None, None)

    made = checkpoint(block, x, norm, use_reentrant=False) if again else block(x, norm)
    loss = linear_cross_entropy(made, first, LABELS)
    plain = torch.autograd.grad(loss, (x, norm, first, second), retain_graph=True)
    grads = torch.autograd.grad(loss, (x, norm, first, second), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, grads))
    for asked in (x, norm, first, second, *(() if again else taken)):
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(grads[0].square().sum(), asked, retain_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.functional.hvp(lambda w: rms_norm(x.detach(), w).square().sum(), norm.detach(), torch.ones(D))


@pytest.mark.skipif(fused.kernels() is None, reason="no C compiler")
def test_hooks_may_write_over_a_gradient_with_a_graph() -> None:
    x, weight = leaves([(2, N, D), (D,)])
    x.register_hook(lambda grad: grad.mul_(2))
    (plain,) = torch.autograd.grad(rms_norm(x, weight).pow(2).sum(), x)
    (grad,) = torch.autograd.grad(rms_norm(x, weight).pow(2).sum(), x, create_graph=True)
    assert torch.equal(plain, grad)


@pytest.mark.parametrize("name", TWICE)
def test_a_second_derivative_is_right(name: str) -> None:
    function, shapes = TWICE[name]
    assert torch.autograd.gradgradcheck(function, leaves(shapes, torch.float64))


def test_a_residual_sum_has_a_second_derivative() -> None:
    x, y = torch.randn(N, D, requires_grad=True), torch.randn(N, D).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(residual_sum(x, y).pow(3).sum(), x, create_graph=True)
    grad.sum().backward()
    torch.testing.assert_close(x.grad, 6 * (x + y).detach())


@pytest.mark.skipif(fused.kernels() is None, reason="no C compiler")
@pytest.mark.parametrize("name", ONCE)
def test_torchs_default_type_changes_nothing(name: str) -> None:
    """What the kernels write is fp32, whatever torch makes where nothing is said."""
    function, shapes = ONCE[name]
    given = leaves(shapes)
    if name in ("divergence", "reading streams", "writing streams"):
        pytest.skip("the test's own constants take the default type")
    plain = function(*given)
    wanted = [plain, *torch.autograd.grad(plain.sum(), given)]
    torch.set_default_dtype(torch.float64)
    try:
        other = function(*given)
        found = [other, *torch.autograd.grad(other.sum(), given)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found))


def test_what_is_added_may_be_broadcast() -> None:
    x, added, weight = torch.randn(64, 512), torch.randn(1, 512), torch.ones(512)
    assert torch.equal(add_rms_norm(x, added, weight)[0], x + added)
