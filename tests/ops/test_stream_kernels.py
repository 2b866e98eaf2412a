"""The compiled router against its composition of torch's operations: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from treadle.layers.streams import Router
from treadle.ops.native import library

CASES: list[dict[str, Any]] = [
    {"routing": "cayley_lie"},
    {"routing": "cayley_lie", "source": "mean", "components": 3},
    {"routing": "cayley_mixture", "streams": 3},
    {"routing": "sinkhorn"},
    {"routing": "sinkhorn", "streams": 2, "source": "mean"},
    {"routing": "birkhoff", "streams": 3},
]
needs_compiler = pytest.mark.skipif(library("streams") is None, reason="no C compiler on this machine")


def made(width: int, **keys: Any) -> Router:
    torch.manual_seed(0)
    router = Router(width, **{"streams": 4, **keys})
    for name, parameter in router.named_parameters():
        torch.nn.init.normal_(parameter, std=1.0 if name == "bias" else 0.5)
    return router


def answers(router: Router, x: torch.Tensor, y: torch.Tensor, way: torch.Tensor, native: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """u, the streams after y is written, and the gradients of x, y and all parameters; y depends on u as in a block."""
    monkeypatch.setattr("treadle.layers.streams.stream_kernels.available", lambda *_: native)
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    reading = router(x)
    assert (reading.routed is not None) == native
    out = reading.write((y + reading.u.sin()).to(y.dtype))
    grads = torch.autograd.grad((out * way).sum(), [x, y, *router.parameters()])
    return [reading.u, out, *grads]


@needs_compiler
@pytest.mark.parametrize("keys", CASES, ids=lambda keys: "-".join(map(str, keys.values())))
@pytest.mark.parametrize("rows, length, width", [(3, 70, 37), (1, 1, 16), (2, 9, 64)])
def test_values_and_gradients(keys: dict[str, Any], rows: int, length: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    router = made(width, **keys)
    n = router.streams
    x, y, way = torch.randn(rows, length, n, width), torch.randn(rows, length, width), torch.randn(rows, length, n, width)
    ours, theirs = (answers(router, x, y, way, native, monkeypatch) for native in (True, False))
    for mine, wanted in zip(ours, theirs):
        torch.testing.assert_close(mine, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()), rtol=1e-4)


@needs_compiler
def test_an_answer_in_bf16_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    router = made(40, routing="cayley_lie")
    x, y, way = torch.randn(1, 20, 4, 40), torch.randn(1, 20, 40).bfloat16(), torch.randn(1, 20, 4, 40)
    ours, theirs = (answers(router, x, y, way, native, monkeypatch) for native in (True, False))
    for mine, wanted in zip(ours, theirs):
        torch.testing.assert_close(mine, wanted, atol=2e-2 * max(1.0, wanted.abs().max().item()), rtol=2e-2)
        assert mine.dtype == wanted.dtype


@needs_compiler
def test_threads_and_neighbours_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    router = made(48, routing="cayley_lie")
    x, y, way = torch.randn(1, 300, 4, 48), torch.randn(1, 300, 48), torch.randn(1, 300, 4, 48)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(answers(router, x, y, way, True, monkeypatch))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found))
    alone = router(x[:, 37:38])
    assert torch.equal(alone.u, found[0][0][:, 37:38])
    assert torch.equal(alone.write(y[:, 37:38] + alone.u.sin()), found[0][1][:, 37:38])
