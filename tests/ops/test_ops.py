"""Every fast path against its plain reference, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treadle.data.batch import Batch
from treadle.layers.rope import rotate, rotation
from treadle.ops import precision
from treadle.ops.attention import attention_reference, causal_attention
from treadle.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from treadle.ops.rms_norm import rms_norm, rms_norm_reference


def both(fast, slow, inputs: list[Tensor], atol: float = 1e-5) -> None:  # type: ignore[no-untyped-def]
    """Equal outputs and equal gradients of every input."""
    results = []
    for function in (fast, slow):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)) if out.dim() else torch.tensor(1.7)
        (out * weights).sum().backward()
        results.append((out.detach(), [leaf.grad for leaf in leaves]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=atol, rtol=1e-4)
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 16)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    both(rms_norm, rms_norm_reference, [torch.randn(shape) * 3, torch.rand(shape[-1]) + 0.5])
    x, w = torch.randn(4, 8, dtype=torch.float64, requires_grad=True), torch.rand(8, dtype=torch.float64)
    reference = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w
    torch.testing.assert_close(rms_norm(x.float(), w.float()), reference.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [7, 300, 20_000])
def test_linear_cross_entropy(vocabulary: int) -> None:
    """Several chunks, ignored labels, a scaled gradient."""
    torch.manual_seed(0)
    positions = 3 * max(64, (1 << 20) // vocabulary) // 2 if vocabulary > 10_000 else 200
    labels = torch.randint(0, vocabulary, (2, positions))
    labels[0, ::3] = -100
    hidden, weight = torch.randn(2, positions, 12), torch.randn(vocabulary, 12)
    both(lambda h, w: linear_cross_entropy(h, w, labels), lambda h, w: linear_cross_entropy_reference(h, w, labels),
         [hidden, weight], atol=2e-3 if vocabulary > 10_000 else 2e-4)  # fmt: skip


def test_linear_cross_entropy_without_labels_is_zero() -> None:
    hidden = torch.randn(1, 5, 4, requires_grad=True)
    total = linear_cross_entropy(hidden, torch.randn(9, 4), torch.full((1, 5), -100))
    total.backward()
    assert float(total) == 0 and hidden.grad is not None and not hidden.grad.any()


def test_linear_cross_entropy_in_bf16_is_close() -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(4, 64, 32), torch.randn(500, 32) * 0.1, torch.randint(0, 500, (4, 64))
    exact = linear_cross_entropy_reference(hidden, weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rough = linear_cross_entropy(hidden, weight, labels)
    assert abs(float(rough / exact) - 1) < 2e-3


@pytest.mark.parametrize("length", [1, 5, 128, 200, 300])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_over_whole_rows(length: int, groups: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, groups, length, 8), torch.randn(2, groups, length, 8)
    segments = ((length,), (length,))
    both(lambda *x: causal_attention(*x, segments=segments), attention_reference, [q, k, v])


@pytest.mark.parametrize(
    "documents", [[[0] * 150 + [1] * 50, [0] * 200], [[0] * 7 + [1] * 90 + [2] * 90 + [-1] * 13, [-1] * 200]]
)
def test_attention_over_documents(documents: list[list[int]]) -> None:
    torch.manual_seed(0)
    doc_ids = torch.tensor(documents)
    segments = Batch.from_ids(torch.zeros_like(doc_ids), doc_ids=doc_ids).segments
    q, k, v = (torch.randn(2, 3, 200, 8) for _ in range(3))
    real = (doc_ids >= 0)[:, None, :, None]
    both(lambda *x: causal_attention(*x, doc_ids=doc_ids, segments=segments) * real,
         lambda *x: attention_reference(*x, doc_ids=doc_ids) * real, [q, k, v])  # fmt: skip
    masked = causal_attention(q, k, v, doc_ids=doc_ids)  # nothing known on the host: the dense mask
    torch.testing.assert_close(masked * real, attention_reference(q, k, v, doc_ids) * real)
    assert masked.isfinite().all()


def test_rotation_is_a_rotation_and_relative() -> None:
    """Lengths stay, and scores depend on the distance of positions alone (arXiv 2104.09864, eq. 16)."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 9, 8)
    cos, sin = rotation(torch.arange(9)[None], 8)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(a: int, b: int) -> Tensor:
        return (rotate(q, *rotation(torch.tensor([[a]]), 8)) * rotate(k, *rotation(torch.tensor([[b]]), 8))).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=1e-4)
    assert abs(float(score(3, 1) - score(5, 1))) > 1e-3

    def plain(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    both(lambda x: rotate(x, cos, sin), plain, [x])


def test_precision_is_a_function_of_the_machine() -> None:
    cpu = torch.device("cpu")
    assert precision.resolve("fp16", cpu, 64) == "fp16" and precision.resolve("auto", cpu, 16) == "fp32"
    assert precision.resolve("auto", cpu, 512) == precision.resolve("auto", cpu, 512)
    assert precision.probe(64) > 0
