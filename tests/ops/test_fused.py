"""csrc/fused.c against the torch form of each operation, forward and backward, in fp32 and bf16, with one thread and two."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from treadle.layers.linear import outputs
from treadle.layers.mlp import MLP
from treadle.layers.rope import rotate, rotation
from treadle.ops import attention, fused
from treadle.ops.attention import block_causal, causal_attention
from treadle.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from treadle.ops.divergence import linear_divergence
from treadle.ops.fused import without_kernels
from treadle.ops.gelu import gelu, gelu_backward, gelu_mlp, gelu_mlp_reference
from treadle.ops.linear import linears
from treadle.ops.residual import residual_sum
from treadle.ops.rms_norm import add_rms_norm, keep_rms_norm, rms_norm, rms_norm_reference
from treadle.ops.rotary import turn_reference
from treadle.ops.scan import scan
from treadle.ops.short_convolution import short_convolution
from treadle.ops.swiglu import gated, gated_backward, gated_products, swiglu, swiglu_reference

DTYPES = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(fused.kernels() is None, reason="no C compiler")
pytestmark = needs_compiler


def results(function: Callable[..., Any], inputs: list[Tensor], autocast: bool = False) -> list[Tensor]:
    """Outputs, and every input's gradient for a fixed random gradient of each output."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(7)
    slopes = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outs]
    torch.autograd.backward(outs, slopes)
    return [*(o.detach() for o in outs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def same(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    """Equal types, and differences within `tolerance` of each tensor's largest number."""
    assert len(a) == len(b)
    for one, other in zip(a, b):
        assert one.dtype == other.dtype and one.shape == other.shape
        error = (one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-30)
        assert float(error) <= tolerance, f"{float(error):.2e}"


def check(function: Callable[..., Any], inputs: list[Tensor], autocast: bool = False, tolerance: float = 2e-6,
          products: bool = False) -> None:  # fmt: skip
    """The kernel against the torch form, and itself with another number of threads: bit for bit, unless a library's products
    are between."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(function, inputs, autocast)
        torch.set_num_threads(3)
        three = results(function, inputs, autocast)
    finally:
        torch.set_num_threads(before)
    assert products or all(torch.equal(a, b) for a, b in zip(one, three))
    with without_kernels():
        slow = results(function, inputs, autocast)
    rough = autocast or any(t.dtype == torch.bfloat16 for t in (*one, *inputs))
    same(one, slow, 2e-2 if rough else tolerance)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 131, 72), (3, 40)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    x, added, weight = torch.randn(shape), torch.randn(shape).to(dtype), torch.rand(shape[-1]) + 0.5
    check(lambda x, w: rms_norm(x, w), [x.to(dtype), weight], autocast)
    check(lambda x, w: keep_rms_norm(x, w), [x, weight], autocast)
    check(residual_sum, [x, added], autocast)
    check(lambda x, y, w: add_rms_norm(x, y, w), [x, added, weight], autocast)
    weight[2] = 0.0  # nothing can be told from its column's result
    check(keep_rms_norm, [x, weight], autocast)
    own, exact = results(rms_norm, [x, weight], autocast)[-2:], results(rms_norm_reference, [x, weight])[-2:]
    assert not autocast or float(own[0][..., 2].abs().max()) > 0
    same(own, exact, 2e-2 if autocast else 2e-6)
    if dtype == torch.float32 and not autocast:
        expected = [x + added, (x + added) / (x + added).pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() * weight]
        same(results(add_rms_norm, [x, added, weight])[:2], expected, 2e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [3, 300])
def test_gated_activation_between_its_products(rows: int, autocast: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, rows, 24), *(torch.randn(shape) * 0.2 for shape in ((56, 24), (56, 24), (24, 56)))]
    check(swiglu, inputs, autocast, 4e-6, products=True)
    gate, up, grad = (torch.randn(700, 40).to(torch.bfloat16 if autocast else torch.float32) for _ in range(3))
    kernel = [gated(gate, up), *gated_backward(grad.clone(), gate, up)]
    with without_kernels():
        same(kernel, [gated(gate, up), *gated_backward(grad, gate, up)], 2e-2 if autocast else 2e-6)
    same(results(swiglu, inputs, autocast), results(swiglu_reference, inputs, autocast), 3e-2 if autocast else 4e-6)
    extreme = torch.tensor([-1e4, -200.0, -1e-30, 0.0, 200.0, 1e4, float("nan"), float("inf")])
    torch.testing.assert_close(gated(extreme, torch.ones(8)), torch.nn.functional.silu(extreme), equal_nan=True, atol=1e-30, rtol=2e-6)


def test_gated_products_take_a_gradient_of_any_strides() -> None:
    torch.manual_seed(0)
    gate, up, slope = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 7), (2, 5, 7), (2, 7, 5)))
    ours, plain = ((f(gate, up).transpose(1, 2) * slope).sum() for f in (gated_products, lambda g, u: F.silu(g) * u))
    same(*(list(torch.autograd.grad(total, (gate, up))) for total in (ours, plain)), 2e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_gelu_between_its_products(rows: int, autocast: bool, biased: bool) -> None:
    torch.manual_seed(0)
    shapes = ((56, 24), (24, 56), (56,), (24,))[: 4 if biased else 2]
    inputs = [torch.randn(2, rows, 24), *(torch.randn(shape) * 0.2 for shape in shapes)]
    check(gelu_mlp, inputs, autocast, 4e-6, products=True)
    same(results(gelu_mlp, inputs, autocast), results(gelu_mlp_reference, inputs, autocast), 3e-2 if autocast else 4e-6)
    x, grad = ((torch.randn(700, 40) * 3).to(torch.bfloat16 if autocast else torch.float32) for _ in range(2))
    kernel = [gelu(x), *gelu_backward(grad.clone(), x)]
    exact = [F.gelu(x.double(), approximate="tanh"), torch.ops.aten.gelu_backward(grad.double(), x.double(), approximate="tanh")]
    for found, wanted in zip(kernel, (*exact, exact[0])):
        torch.testing.assert_close(found.double(), wanted, atol=2e-6, rtol=4e-3 if autocast else 2e-6)
    extreme = torch.tensor([-1e4, -200.0, -1e-30, 0.0, 200.0, 1e4, float("nan"), float("inf")])
    torch.testing.assert_close(gelu(extreme), F.gelu(extreme, approximate="tanh"), equal_nan=True, atol=1e-30, rtol=2e-6)
    for huge in (-1e12, -3e18):
        assert [float(t) for t in (gelu(torch.tensor([huge])), *gelu_backward(torch.ones(1), torch.tensor([huge])))] == [0.0] * 3
    slopes = gelu_backward(torch.ones(8), extreme)[0]
    torch.testing.assert_close(slopes[:6], torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0]), atol=1e-20, rtol=1e-6)


def test_the_plain_mlp_keeps_no_result_of_its_activation() -> None:
    """And gradients of what is frozen are not computed."""
    mlp, kept = MLP(24, 56), []
    mlp.up.weight.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = mlp(torch.randn(300, 24, requires_grad=True))
    assert kept.count(torch.Size([300, 56])) == 1
    out.sum().backward()
    assert mlp.up.weight.grad is None and mlp.up.bias.grad is not None
    torch.testing.assert_close(mlp.down.bias.grad, torch.full((24,), 300.0))


def test_a_replaced_layer_needs_no_bias() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    x, plain = torch.randn(3, 4), torch.nn.Linear(4, 4)
    assert all(torch.equal(a, b) for a, b in zip(outputs(x, Twice(), plain), (2 * x, plain(x))))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [2, 150])
def test_products_of_one_input(rows: int, autocast: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, rows, 24), torch.randn(40, 24), torch.randn(8, 24), torch.randn(24, 24)]
    one, other = (results(f, inputs, autocast) for f in (linears, lambda x, *ws: tuple(F.linear(x, w) for w in ws)))
    same(one, other, 2e-2 if autocast else 4e-6)
    biased = [*inputs, *(torch.randn(len(w)) for w in inputs[1:])]
    one = results(lambda x, *ts: linears(x, *ts[:3], biases=list(ts[3:])), biased, autocast)
    same(one, results(lambda x, *ts: tuple(map(F.linear, [x] * 3, ts[:3], ts[3:])), biased, autocast), 2e-2 if autocast else 4e-6)
    frozen = inputs[1].clone().requires_grad_()
    linears(inputs[0], frozen, inputs[2])[0].sum().backward()
    torch.testing.assert_close(frozen.grad, inputs[0].sum((0, 1)).expand(40, 24), atol=1e-4, rtol=1e-4)


def test_products_are_counted() -> None:
    x, weight = torch.randn(512, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        sum(linears(x, weight, weight)).sum().backward()  # type: ignore[union-attr]
    assert counter.get_total_flops() == 6 * 2 * 512 * 32 * 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angles", [(1, 16), (3, 16), (3, 10)])
def test_rotation(angles: tuple[int, int], dtype: torch.dtype) -> None:
    """Of heads that lie inside a projection, for all dimensions and for the first of them."""
    torch.manual_seed(0)
    turned = rotation(torch.randint(0, 500, (angles[0], 50)), angles[1])
    inputs = [torch.randn(3, 50, 4, 16).to(dtype)]
    check(lambda x: rotate(x.transpose(1, 2), *turned), inputs, tolerance=1e-6)
    check(lambda x: rotate(x, *turned), [inputs[0].transpose(1, 2).contiguous()], tolerance=1e-6)
    exact = [turn_reference(x.transpose(1, 2).float(), *turned) for x in inputs]
    same([t.float() for t in results(lambda x: rotate(x.transpose(1, 2), *turned), inputs)[:1]], exact, 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40, 150])
def test_attention(window: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 4, 300, 16).to(dtype) * 2 for _ in range(3)]
    segments = ((300,), (170, 130), (60, 211, -29))
    check(lambda *x: block_causal(*x, segments, window), inputs, tolerance=4e-6, products=True)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()
    mask &= ~torch.ones_like(mask).tril(-(window or 300))
    if dtype == torch.float32:
        row = [x[:1] for x in inputs]
        exact = results(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), row)
        same(results(lambda *x: block_causal(*x, segments[:1], window), row), exact, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segments", [((300,),) * 3, ((300,), (170, 130), (60, 211, -29)), ((20, 280), (20, 280), (300,))])
def test_long_documents_go_through_torchs_kernel(segments: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 4, 300, 16).to(dtype), *(torch.randn(3, 2, 300, 16).to(dtype) for _ in range(2))]
    blocks = results(lambda *x: block_causal(*x, segments), inputs)
    monkeypatch.setattr(attention, "LONG", dict.fromkeys(DTYPES, 200))
    assert attention.LONG and any(run >= 200 for row in segments for run in row)
    calls: list[int] = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(q.shape[2]) or plain(q, *a, **k))
    same(results(lambda *x: block_causal(*x, segments), inputs), blocks, 2e-2 if dtype == torch.bfloat16 else 4e-6)
    assert calls and min(calls) >= 200


def test_a_long_row_keeps_no_probabilities_and_is_counted() -> None:
    length = attention.LONG[torch.float32]
    x, kept = torch.randn(1, 1, length, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t), FlopCounterMode(display=False) as counter:
        block_causal(x, x, x, ((length,),)).sum().backward()
    assert max(kept) <= 8 * length
    assert counter.get_total_flops() == (4 + 10) * length * length * 8  # two products forward; five backward, the scores once more


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy(autocast: bool, softcap: float | None) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 333, (2, 200))
    labels[0, ::3] = -100
    inputs = [torch.randn(2, 200, 24), torch.randn(333, 24)]
    check(lambda h, w: linear_cross_entropy(h, w, labels, softcap), inputs, autocast, 1e-5, products=True)
    exact = results(lambda h, w: linear_cross_entropy_reference(h, w, labels, softcap), inputs, autocast)
    same(results(lambda h, w: linear_cross_entropy(h, w, labels, softcap), inputs, autocast), exact, 3e-2 if autocast else 1e-5)


@pytest.mark.parametrize("cap", [0.1, 1.0, 30.0, 1e3, 1e5, 1e8])
def test_a_softcap_of_any_size(cap: float) -> None:
    torch.manual_seed(0)
    labels, inputs = torch.randint(0, 33, (2, 20)), [torch.randn(2, 20, 24), torch.randn(33, 24)]
    wide = [x.double() for x in inputs]
    exact = [t.float() for t in results(lambda h, w: linear_cross_entropy_reference(h, w, labels, cap), wide)]
    same(results(lambda h, w: linear_cross_entropy(h, w, labels, cap), inputs), exact, 1e-5)


@pytest.mark.parametrize("shape", [(2, 6), (2, 3), (11,), (1, 5)])
def test_labels_for_other_positions_are_refused(shape: tuple[int, ...]) -> None:
    hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(11, 8), torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match="one for each position"):
        linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ValueError, match="same positions"):
        linear_divergence(hidden, weight, hidden, weight, labels, 1.0)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("label", [50, 60, 10**8, 2**62, -1, -101])
def test_a_label_outside_the_vocabulary_is_refused(label: int, compiled: bool) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(300, 32), torch.randn(50, 32), torch.randint(0, 50, (300,))
    labels[5] = label
    with nullcontext() if compiled else without_kernels(), pytest.raises((IndexError, RuntimeError), match=str(label)):
        linear_cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("compiled", [True, False])
def test_labels_of_other_integers(compiled: bool) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(300, 32), torch.randn(50, 32), torch.randint(0, 50, (300,))
    labels[::3] = -100
    with nullcontext() if compiled else without_kernels():
        wide, narrow = (linear_cross_entropy(hidden, weight, kind) for kind in (labels, labels.int()))
        assert torch.equal(wide, narrow) and torch.equal(wide, linear_cross_entropy(hidden, weight, labels.to(torch.int8)))


def test_buffers_without_memory_are_an_error() -> None:
    """Of no rows, but of a width that no machine has room for."""
    native, wide, none = fused.kernels(), 1 << 50, (None, 0)
    assert native is not None
    calls: dict[str, tuple[Any, ...]] = {
        "norm_forward": (*none, *none, None, 0.0, None, *none, None, 0, wide, 2),
        "norm_backward": (*none, *none, None, None, None, None, *none, *none, None, None, 0, wide, 2),
        "rotate": (None, None, None, None, 0, None, None, 1, 1.0, 0, 1, 1, wide, 0, 2),
        "causal_softmax": (*none, 1.0, 0, 1, wide, 0, 0, 2),
        "causal_softmax_backward": (None, None, 0, 1.0, 0, 1, wide, 0, 0, 2),
        "cross_entropy": (*none, None, -100, 0.0, None, 0, 0, wide, 2),
    }
    for name, given in calls.items():
        with pytest.raises(MemoryError):
            getattr(native, name)(*given)


@pytest.mark.parametrize("name", ["rms_norm", "loss", "swiglu", "attention", "scan", "convolution"])
def test_tools_that_trace_see_operations_of_torch(name: str) -> None:
    """Tensors without contents call no kernel while memory is planned; anybody else's have to end up in the graph that is made."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 128, 32), torch.randn(32)
    up, down, labels = torch.randn(48, 32), torch.randn(32, 48), torch.randint(0, 48, (2, 128))
    q = x.view(2, 128, 2, 16).transpose(1, 2)
    of = {
        "rms_norm": lambda x: rms_norm(x, weight, 1e-6),
        "loss": lambda x: linear_cross_entropy(x, up, labels),
        "swiglu": lambda x: swiglu(x, up, up, down),
        "attention": lambda x: causal_attention(q * x.mean(), q, q),
        "scan": lambda x: scan(x.sigmoid(), x),
        "convolution": lambda x: short_convolution(x, down[:, :4], silu=True),
    }[name]
    graph = make_fx(of, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(graph(x), of(x), atol=1e-4, rtol=1e-4)
