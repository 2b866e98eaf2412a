"""The compiled passes of INL dynamics against the equations: values and every gradient, bounds and 16 bits included."""

from __future__ import annotations

import pytest
import torch

from treadle.ops import dynamics as ops
from treadle.ops.native import library

pytestmark = pytest.mark.skipif(library("dynamics") is None, reason="no C compiler on this machine")


def given(width: int, rows: int = 150) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(2, rows, width), (2, rows, width), (width,), (8, 2 * width), (8,), (3 * width, 8), (3 * width,)]
    made = [torch.randn(shape) * (0.3 if len(shape) == 2 else 2.0) for shape in shapes]
    made[1][:, ::3] *= 20.0  # beyond the largest velocity
    return [t.requires_grad_() for t in made]


def found(way: object, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    moved, velocity = way(*tensors, ops.Limits())  # type: ignore[operator]
    slope = torch.arange(moved.numel(), dtype=torch.float32).view(moved.shape).cos()
    return [moved, velocity, *torch.autograd.grad((moved * slope + velocity * slope.sin()).sum(), tensors)]


@pytest.mark.parametrize("width", [5, 32, 61])
def test_values_and_gradients(width: int) -> None:
    tensors = given(width)
    for mine, wanted in zip(found(ops.dynamics, tensors), found(ops.dynamics_reference, tensors)):
        torch.testing.assert_close(mine, wanted, atol=2e-5 * max(1.0, wanted.abs().max().item()), rtol=1e-4)


def test_products_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = given(48)
    halves = [tensors[0].detach().bfloat16().requires_grad_(), *tensors[1:]]
    for inputs in (tensors, halves):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = found(ops.dynamics, inputs)
            with monkeypatch.context() as without:
                without.setattr(ops.dynamics_kernels, "available", lambda *_, **__: False)
                theirs = found(ops.dynamics, inputs)
        for mine, wanted in zip(ours, theirs):
            assert mine.dtype == wanted.dtype and (mine - wanted).norm() <= 0.01 * wanted.norm()


def test_threads_change_no_bit() -> None:
    tensors, all_found, before = given(64, 500), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            logits = torch.randn(1000, 192, generator=torch.Generator().manual_seed(0))
            rows = [t.detach().flatten(0, 1) for t in tensors[:2]]
            mu = tensors[2].detach()
            moved = ops.dynamics_kernels.moved(logits, *rows, mu, ops.Limits())
            all_found.append([*moved, *ops.dynamics_kernels.slopes(logits, *rows, mu, ops.Limits(), *moved)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*all_found))
