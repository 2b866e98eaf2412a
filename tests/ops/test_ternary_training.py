"""The compiled ternary layer of training against its composition of torch's operations."""

from __future__ import annotations

import math

import pytest
import torch

from treadle.layers.bitlinear import EPS
from treadle.ops.native import library
from treadle.ops.rms_norm import rms_norm_same_dtype
from treadle.ops.ternary import ternary_linear
from treadle.ops.ternary_training import normed_ternary_linear

pytestmark = pytest.mark.skipif(library("ternary_training") is None, reason="no C compiler on this machine")


def given(rows: int, width: int, out: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, gain, weight = torch.randn(rows, width), torch.rand(width) + 0.5, torch.randn(out, width) * 0.05
    return [t.requires_grad_() for t in (x, gain, weight)]


def composed(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ternary_linear(rms_norm_same_dtype(x.float(), gain, EPS), weight)


def near(mine: torch.Tensor, wanted: torch.Tensor, share: float) -> None:
    """All but a few rows, where the last bit of a norm moved a rounding, agree; those to one step of 127."""
    size = wanted.abs().max()
    assert mine.dtype == wanted.dtype and (mine - wanted).abs().max() <= 0.02 * size
    assert ((mine - wanted).abs() > share * size).float().mean() < 0.02


@pytest.mark.parametrize("rows, width, out", [(17, 40, 24), (200, 61, 7), (130, 96, 130)])
def test_values_and_gradients(rows: int, width: int, out: int) -> None:
    inputs, slope = given(rows, width, out), torch.randn(rows, out)
    found = []
    for way in (composed, lambda *t: normed_ternary_linear(*t, EPS)):
        y = way(*inputs)
        found.append([y, *torch.autograd.grad((y * slope).sum(), inputs)])
    for wanted, mine in zip(*found):
        near(mine, wanted, 1e-5)


def test_under_autocast_values_stay_and_gradients_are_those_of_bf16() -> None:
    inputs, slope = given(150, 64, 48), torch.randn(150, 48)
    plain = normed_ternary_linear(*inputs, EPS)
    wanted = torch.autograd.grad((plain * slope).sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = normed_ternary_linear(*inputs, EPS)
        half = normed_ternary_linear(inputs[0].bfloat16(), *inputs[1:], EPS)
    assert torch.equal(narrow, plain) and half.dtype == torch.float32
    for grad, want in zip(torch.autograd.grad((narrow * slope).sum(), inputs), wanted):
        assert (grad - want).norm() < 0.01 * want.norm() and grad.dtype == torch.float32
    for grad, want in zip(torch.autograd.grad((half * slope).sum(), inputs), wanted):
        assert (grad - want).norm() < 0.02 * want.norm()


def test_threads_and_other_rows_change_no_bit() -> None:
    x, gain, weight = given(200, 64, 30)
    whole = normed_ternary_linear(x, gain, weight, EPS)
    assert all(torch.equal(normed_ternary_linear(x[:rows], gain, weight, EPS), whole[:rows]) for rows in (1, 16, 17, 130))
    inputs, slope, before, found = given(1500, 64, 90), torch.randn(1500, 90), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = normed_ternary_linear(*inputs, EPS)
            found.append([y, torch.autograd.grad((y * slope).sum(), inputs[1])[0]])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_rounded_away(bad: float) -> None:
    x, gain, weight = (t.detach() for t in given(30, 40, 8))
    x[1, 7] = bad
    y = normed_ternary_linear(x, gain, weight, EPS)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    gain[3] = bad
    assert normed_ternary_linear(x[2:], gain, weight, EPS).isnan().all()
    weight[0, 0] = bad
    assert not normed_ternary_linear(x[2:], torch.ones(40), weight, EPS).isfinite().any()


def test_silence_is_no_division_by_zero() -> None:
    gain, weight = torch.ones(40), torch.zeros(8, 40)
    assert torch.equal(normed_ternary_linear(torch.zeros(20, 40), gain, weight + 0.1, EPS), torch.zeros(20, 8))
    assert torch.isfinite(normed_ternary_linear(torch.randn(20, 40), gain, weight, EPS)).all()
