"""Ternary products: exact integers, straight-through gradients, packing, the compiled form."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import treadle.ops.ternary as ops
from treadle.layers.bitlinear import BitLinear
from treadle.ops.native import library


def layer(width: int = 40, out: int = 24, seed: int = 0) -> BitLinear:
    torch.manual_seed(seed)
    made = BitLinear(width, out)
    torch.nn.init.normal_(made.weight, std=0.05)
    torch.nn.init.uniform_(made.gain, 0.5, 1.5)
    return made


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 200])
@pytest.mark.parametrize("width, out", [(40, 24), (61, 7), (512, 130), (3, 1)])
def test_integers_are_those_of_int64(rows: int, width: int, out: int) -> None:
    torch.manual_seed(rows)
    q = torch.randint(-128, 128, (rows, width), dtype=torch.int8)
    ternary = torch.randint(-1, 2, (out, width), dtype=torch.int8)
    want = (q.long() @ ternary.long().t()).float()
    assert torch.equal(ops.integer_product(q, ternary), want)
    codes = ops.pack(ternary)
    assert codes.shape == (out, -(-width // 4)) and torch.equal(ops.unpack(codes, width), ternary)
    # A packed layer whose rounding gives back these very integers: the row's largest is 127 in size.
    q = q.clamp(-127, 127)
    q[:, 0] = 127
    made = ops.PackedLayer(ternary, torch.tensor(0.75), torch.ones(width), 1e-8)
    x = q.float()
    sums = (q.long() @ ternary.long().t()).float()
    assert torch.equal(made(x), sums * (0.75 / (127.0 / made.normalize(x).abs().amax(-1, keepdim=True))).float())


PROGRAM = """
import os, torch, treadle
from treadle.ops import native
native.FLAGS = tuple(flag.replace("=native", "=" + os.environ["MACHINE"]) for flag in native.FLAGS)
from treadle.data.batch import Batch
from treadle.ops.native import library
found = [library("ternary") is not None]
for keys in ({"num_heads": 3, "expand_ratio": 2}, {"output_gate": "hgrn", "lower_bound": True}):
    model = treadle.build("hgrn_bit", vocab_size=77, hidden_size=45, num_layers=2, **keys).eval()
    ids = torch.randint(0, 77, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, state = [model(Batch.from_ids(ids)).logits], model.new_state(2, 30)
        for t in range(30):
            logits.append(model(Batch.from_ids(ids[:, t : t + 1]), state=state).logits)
    assert torch.equal(logits[0], torch.cat(logits[1:], 1)), keys
    found.append(hash(logits[0].numpy().tobytes()))
print(*found)
"""


def test_the_compiled_forms_are_used_here_and_their_absence_changes_no_bit() -> None:
    """Of this machine, and of older ones of its kind: AVX2, and nothing beyond the first 64-bit processors."""
    if library("ternary") is None:
        pytest.skip("no C compiler on this machine")
    older = ["haswell", "x86-64"] if platform.machine() == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text() else []
    found = []
    for machine in ("native", *older, None):
        out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120,
                             env={**os.environ, "TREADLE_NATIVE": "1" if machine else "0", "PYTHONHASHSEED": "0",
                                  "MACHINE": machine or "native"})  # fmt: skip
        assert out.returncode == 0, out.stderr
        found.append(out.stdout.split())
    assert found[-1][0] == "False" and all(f[0] == "True" for f in found[:-1])
    assert all(f[1:] == found[-1][1:] for f in found)


def test_values_follow_the_definition_to_one_ulp() -> None:
    made, x = layer(), torch.randn(5, 40)
    n = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-8).sqrt()) * made.gain.double()
    q = (n * (127 / n.abs().amax(-1, keepdim=True))).round()
    a = made.weight.abs().mean()
    ternary = (made.weight / a).round().clamp(-1, 1).double()
    want = (q @ ternary.t() * (a.double() * n.abs().amax(-1, keepdim=True) / 127)).float()
    for mode in (made.train(), made.eval()):
        with torch.no_grad():
            assert torch.allclose(mode(x), want, rtol=3e-7, atol=0)


def test_gradients_go_straight_through() -> None:
    x = torch.randn(6, 40, requires_grad=True)
    weight = (torch.randn(24, 40) * 0.05).requires_grad_()
    out, slope = ops.ternary_linear(x, weight), torch.randn(6, 24)
    out.backward(slope)
    q, s = ops.quantize_activations(x.detach())
    ternary, a = ops.quantize_weights(weight.detach())
    wanted_x = slope.double() @ (ternary.double() * a.double())
    wanted_w = slope.double().t() @ (q.double() / s.double())
    assert (x.grad - wanted_x).abs().max() < 1e-5 and (weight.grad - wanted_w).abs().max() < 1e-4
    again, other = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    rounded, matrix = ops.dequantized(again, other)
    (rounded @ matrix.t()).backward(slope)
    assert torch.allclose(again.grad, x.grad, atol=1e-5) and torch.allclose(other.grad, weight.grad, atol=1e-4)
    assert torch.allclose(rounded @ matrix.t(), out, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    made, x = layer(), torch.randn(3, 7, 40)
    plain = made(x)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(made(x), plain)


def test_rows_are_independent_bit_for_bit_and_new_weights_are_seen() -> None:
    made, x = layer().eval(), torch.randn(33, 40)
    with torch.no_grad():
        whole = made(x)
        assert all(torch.equal(made(x[i : i + 1]), whole[i : i + 1]) for i in range(33))
        # Training takes torch's norm: where its last bit moves a rounding, one activation is 1/127 off.
        assert (made.train()(x) - whole).abs().max() < 0.02 * whole.abs().max()
        made.eval().weight.mul_(-1)
        assert torch.equal(made(x), -whole)


def test_a_replaced_parameter_is_seen() -> None:
    """A new parameter's version is 0, as its predecessor's may have been."""
    made, x = layer().eval(), torch.randn(3, 40)
    made.gain = torch.nn.Parameter(torch.ones(40))
    with torch.no_grad():
        made(x)
        made.gain = torch.nn.Parameter(torch.linspace(0.1, 3.0, 40))
        second = made(x)
        made.clear_weight_cache()
        assert torch.equal(second, made(x))


def test_silence_is_no_division_by_zero() -> None:
    made = layer()
    assert torch.equal(made(torch.zeros(2, 40)), torch.zeros(2, 24))
    torch.nn.init.zeros_(made.weight)
    assert torch.isfinite(made(torch.randn(2, 40))).all()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [3, 20])
def test_what_is_not_finite_is_not_rounded_away(rows: int, bad: float, compiled: bool) -> None:
    """A diverged model must evaluate to NaN, in C too: integers would hide it."""
    x = torch.randn(rows, 40)
    x[1, 7] = bad
    ternary = torch.randint(-1, 2, (24, 40), dtype=torch.int8)
    made = ops.PackedLayer(ternary, torch.tensor(0.75), torch.ones(40), 1e-8)
    spoilt = ops.PackedLayer(ternary, torch.tensor(0.75), torch.ones(40).index_fill_(0, torch.tensor(3), bad), 1e-8)
    if not compiled:
        made.native = spoilt.native = None
    y = made(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    assert spoilt(x[:1]).isnan().all()


@pytest.mark.parametrize("width, out", [(512, 1030), (1500, 513)])
def test_threads_change_no_bit(width: int, out: int) -> None:
    made = ops.PackedLayer(torch.randint(-1, 2, (out, width), dtype=torch.int8), torch.tensor(0.75), torch.ones(width), 1e-8)
    x, before, found = torch.randn(2, width), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(made(x))
    finally:
        torch.set_num_threads(before)
    made.native = None
    assert all(torch.equal(made(x), y) for y in found)
