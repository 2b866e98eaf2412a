"""The kernels of another package: what we give them, and that they are used only where they agree. Stand-ins with their signatures
([B, T, H, ...], cu_seqlens over one long row) run here; the kernels themselves in tests/contracts/test_on_a_gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from treadle.ops import flash_linear_attention as fla
from treadle.ops.delta_rule import delta_rule_reference
from treadle.ops.ssd import ssd_reference
from treadle.ops.wkv import wkv_reference


def stand_in(kind: str, wrong: bool = False) -> Callable[..., tuple[Tensor, None]]:
    def of(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, scale: float, cu_seqlens: Tensor | None = None, **named: Tensor) -> Any:
        assert q.dtype == torch.bfloat16 and (cu_seqlens is None or q.shape[0] == 1)
        documents = None
        if cu_seqlens is not None:
            documents = torch.searchsorted(cu_seqlens[1:], torch.arange(q.shape[1]), right=True)[None]
        q, k, v = ((t.float() * (scale if t is q else 1.0)).transpose(1, 2) for t in (q, k, v))
        g = named["g"].transpose(1, 2) if "g" in named else rest[0].transpose(1, 2)
        g = g * 0.5 if wrong else g
        if kind == "ssd":
            y = ssd_reference(v, g, k, q, documents)[0]
        elif kind == "delta_rule":
            y = delta_rule_reference(q, k, v, g, named["beta"].transpose(1, 2), documents)[0]
        else:
            y = wkv_reference(q, k, v, g, rest[1], documents)[0]
        return y.transpose(1, 2).to(torch.bfloat16), None

    return of


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    fla.agrees.cache_clear()
    yield
    fla.agrees.cache_clear()


@pytest.mark.parametrize("kind", fla.PLACES)
def test_layouts_and_signs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "_kernel", stand_in)
    assert fla.agrees(kind, torch.bfloat16, "cpu")


@pytest.mark.parametrize("kind", fla.PLACES)
@pytest.mark.parametrize("how", ["wrong", "another signature"])
def test_a_kernel_that_differs_is_not_used(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = stand_in(kind, wrong=True) if how == "wrong" else lambda q, k, v: (q, None)
    monkeypatch.setattr(fla, "_kernel", lambda kind: wrong)
    with pytest.warns(UserWarning, match="is not used"):
        assert not fla.agrees(kind, torch.bfloat16, "cpu")


def test_nothing_is_used_on_a_cpu_or_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "_kernel", stand_in)
    for dtype in (torch.float32, torch.bfloat16):
        assert fla.flash("ssd", dtype, None, None, *fla.sample("ssd", "cpu")) is None


@pytest.mark.parametrize("where", ["a block that recomputes", "inference mode"])
def test_it_may_be_asked_anywhere(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial has gradients of its own, which a block's recomputation must not count nor inference mode forbid."""
    monkeypatch.setattr(fla, "_kernel", stand_in)
    if where == "inference mode":
        with torch.inference_mode():
            assert fla.agrees("ssd", torch.bfloat16, "cpu")
        return
    weight = torch.ones(4, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        y = (x * weight).sin()
        assert fla.agrees("ssd", torch.bfloat16, "cpu")
        return (y * weight).cos()

    torch.utils.checkpoint.checkpoint(block, torch.ones(4), use_reentrant=False).sum().backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())
