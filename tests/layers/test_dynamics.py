"""INL dynamics as a layer: the equations, their gradient and what it keeps, the bounds that hold for every input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import treadle
from treadle.errors import ConfigError
from treadle.layers.dynamics import INLDynamics, Steered, statistics
from treadle.ops.dynamics import Limits, dynamics, dynamics_reference

TIGHT = Limits(step=0.3, beta_max=0.9, velocity_max=1.0)  # all three clamps are reached by some numbers


def inputs(spread: float, dtype: torch.dtype = torch.float64, width: int = 6) -> list[Tensor]:
    """h, v, mu, W1, c1, W2, c2 that want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, width), (4, 3, width), (width,), (5, 2 * width), (5,), (3 * width, 5), (3 * width,)]
    return [(torch.randn(s, generator=generator, dtype=torch.float64) * spread).to(dtype).requires_grad_() for s in shapes]


def shaken(width: int = 16, std: float = 3.0, **keys: Any) -> INLDynamics:
    """A layer far from its start, mu outside its bounds in places."""
    layer, generator = INLDynamics(width, **keys), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return layer


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_gradient_is_right(spread: float) -> None:
    given = inputs(spread)
    assert torch.autograd.gradcheck(lambda *x: dynamics(*x, TIGHT), given)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_it_is_the_plain_form(dtype: torch.dtype, bound: float) -> None:
    """Values and gradients, also beyond every clamp. (At a spread of 3 the sigmoids are so far out that either form's fp32
    is 1e-5 from the truth.)"""
    for spread in (0.3, 1.0):
        given = inputs(spread, dtype)
        found = []
        for form in (dynamics, dynamics_reference):
            moved, velocity = form(*given, TIGHT)
            found.append([moved, velocity, *torch.autograd.grad(moved.sin().sum() + velocity.square().sum(), given)])
        for ours, plain in zip(*found):
            assert float((ours - plain).detach().abs().max()) <= bound * max(1.0, float(plain.detach().abs().max()))


def test_the_equations_by_hand() -> None:
    """One feature, a controller that says nothing: the gains are the constants."""
    layer = INLDynamics(1)
    with torch.no_grad():
        layer.controller_out.weight.zero_()  # type: ignore[union-attr]
    moved, velocity = layer(torch.tensor([[[3.0]]]), torch.tensor([[[0.5]]]))
    assert velocity.item() == pytest.approx(0.9 * 0.5 - 0.1 * (3.0 - 1.0), abs=1e-6)
    assert moved.item() == pytest.approx(3.0 + 0.1 * 0.5 * velocity.item(), abs=1e-6)
    lite = INLDynamics(1, lite=True)(torch.tensor([[[3.0]]]), torch.tensor([[[0.5]]]))
    assert torch.allclose(torch.stack(lite), torch.stack((moved, velocity)), atol=1e-6)
    assert [name for name, _ in INLDynamics(4, lite=True).named_parameters()] == ["mu"]


def test_the_start() -> None:
    layer = INLDynamics(256)
    alpha, beta, gate = (x.mean().item() for x in layer.gains(torch.randn(2, 8, 256), torch.zeros(2, 8, 256)))
    assert (alpha, beta, gate) == (pytest.approx(0.9, abs=0.01), pytest.approx(0.1, abs=0.01), pytest.approx(0.5, abs=0.01))
    assert layer.controller_out.weight.std().item() == pytest.approx(0.01, rel=0.05)  # type: ignore[union-attr]
    assert torch.equal(layer.mu, torch.ones(256))


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("lite", [False, True])
def test_no_input_moves_h_far_or_beta_high(scale: float, precision: str, lite: bool) -> None:
    """|h' - h| <= step velocity_max beside the rounding of h itself; beta <= beta_max; all finite, gradients included."""
    for keys in ({}, {"step": 0.5, "velocity_max": 3.0, "beta_max": 1.5}):
        layer = shaken(lite=lite, **keys)
        generator = torch.Generator().manual_seed(2)
        h = (scale * torch.randn(64, 16, generator=generator)).requires_grad_()
        v = layer.limits.velocity_max * (2 * torch.rand(64, 16, generator=generator) - 1)
        with treadle.autocast(precision):
            moved, velocity = layer(h, v)
            beta = layer.gains(h, v)[1]
        bound = layer.limits.step * layer.limits.velocity_max
        rounding = h.detach().abs() * 2.0**-23
        assert bool(((moved - h).abs() <= bound * (1 + 1e-6) + rounding).all())
        assert float(velocity.detach().abs().max()) <= layer.limits.velocity_max
        assert float(beta.detach().max()) <= layer.limits.beta_max and float(beta.detach().min()) >= 0
        (moved.sum() + velocity.sum()).backward()
        assert all(bool(p.grad.isfinite().all()) for p in (h, *layer.parameters()))  # type: ignore[union-attr]


@pytest.mark.parametrize("lite", [False, True])
def test_mu_is_used_within_its_bounds(lite: bool) -> None:
    layer, h, v = INLDynamics(3, lite=lite), torch.randn(5, 3), torch.randn(5, 3)
    with torch.no_grad():
        layer.mu.copy_(torch.tensor([-7.0, 1.5, 9.0]))
        far = layer(h, v)
        layer.mu.copy_(torch.tensor([0.0, 1.5, 2.0]))
        near = layer(h, v)
    assert all(torch.equal(a, b) for a, b in zip(far, near))


def test_every_gain_a_controller_can_choose_is_stable() -> None:
    """Repeated with constant gains, a layer is [e, v] -> [[1 - k b, k a], [-b, a]] [e, v] with e = h - mu, k = step gate: it
    contracts where 0 < k b < 2 (1 + a), and only there. The defaults keep ten times away from the bound."""
    generator = torch.Generator().manual_seed(3)
    a, k, b = (torch.rand(4000, generator=generator, dtype=torch.float64) * s for s in (1.0, 1.0, 8.0))
    step = torch.stack((torch.stack((1 - k * b, k * a), -1), torch.stack((-b, a), -1)), -2)
    radius = torch.linalg.eigvals(step).abs().amax(-1)
    inside = k * b < 2 * (1 + a)
    assert bool((radius[inside] < 1).all()) and bool((radius[~inside] >= 1).all()) and 0 < int(inside.sum()) < 4000
    layer = shaken(std=10.0)
    alpha, beta, gate = layer.gains(torch.randn(500, 16) * 100, torch.randn(500, 16))
    assert bool((10 * layer.limits.step * gate * beta <= 2 * (1 + alpha)).all())


@pytest.mark.parametrize("lite", [False, True])
def test_repeated_it_comes_to_rest_at_mu(lite: bool) -> None:
    layer = INLDynamics(8, lite=lite)
    h, v = torch.randn(1, 1, 8) * 5, torch.zeros(1, 1, 8)
    with torch.no_grad():
        for _ in range(3000):
            h, v = layer(h, v)
    assert float((h - 1.0).abs().max()) < 1e-3 and float(v.abs().max()) < 1e-3


def saved_bytes(run: Any, spared: list[Tensor]) -> int:
    """What autograd keeps of a call, each storage once, beside tensors that are there anyway."""
    own, kept = {t.untyped_storage().data_ptr() for t in spared}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (tensor.nbytes, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = run()
    assert out is not None
    return sum(size for size, _ in kept.values())


def test_it_keeps_its_inputs_and_nothing_else() -> None:
    layer = INLDynamics(64)
    h, v = (torch.randn(2, 32, 64).requires_grad_() for _ in range(2))
    one, two = layer.controller_in, layer.controller_out
    assert one is not None and two is not None
    given = (h, v, layer.mu, one.weight, one.bias, two.weight, two.bias)
    assert saved_bytes(lambda: layer(h, v), list(given)) == 0
    plain = saved_bytes(lambda: dynamics_reference(*given, layer.limits), list(given))
    assert plain > 10 * h.nbytes
    lite = INLDynamics(64, lite=True)
    assert saved_bytes(lambda: lite(h, v), [h, v, *lite.parameters()]) <= h.nbytes


def test_types() -> None:
    """Under autocast a branch in bf16 meets a velocity in fp32, and what comes out is fp32; in a bf16 model all is bf16."""
    for lite in (False, True):
        layer = INLDynamics(8, lite=lite)
        h, v = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.zeros(2, 3, 8)
        with treadle.autocast("bf16"):
            assert [x.dtype for x in layer(h, v)] == [torch.float32] * 2
        assert [x.dtype for x in layer.bfloat16()(h, v.bfloat16())] == [torch.bfloat16] * 2
        wide = INLDynamics(8, lite=lite).double()
        assert [x.dtype for x in wide(h.double(), v.double())] == [torch.float64] * 2


def test_statistics() -> None:
    layer, record = INLDynamics(8), []
    h, v = layer(torch.randn(2, 3, 8), torch.zeros(2, 3, 8), record)
    _, last = layer(h, v, record)
    assert isinstance(record[0], Steered)
    found = statistics(record)
    assert found.keys() == {"mu_mean", "mu_std", "mu_min", "mu_max", "beta_max_seen", "velocity_rms"}
    assert found["velocity_rms"] == pytest.approx(math.sqrt((v.square().mean() + last.square().mean()).item() / 2))
    assert found["beta_max_seen"] == pytest.approx(0.1, abs=0.02) and statistics([]) == {}


def test_usable_alone() -> None:
    """A stack of one's own: zeros for the first layer, each layer's velocity for the next."""
    layers = nn.ModuleList(treadle.INLDynamics(8) for _ in range(3))
    h, v = torch.randn(2, 5, 8), torch.zeros(2, 5, 8)
    for layer in layers:
        h, v = layer(h, v)
    (h.sum() + v.sum()).backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in layers.parameters())


@pytest.mark.parametrize(
    ("keys", "says"),
    [({"step": 1.0}, "use a step below 1"), ({"beta": 3.0}, "lower beta or raise beta_max"), ({"mu_initial": 5.0}, "give one that does"),
     ({"alpha": 1.0}, "between 0 and 1"), ({"velocity_max": 0.0}, "above 0")],
)  # fmt: skip
def test_constants_that_contradict_each_other(keys: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        INLDynamics(4, **keys)  # type: ignore[arg-type]


def test_what_a_compiler_gets_is_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain form has the types of the memory-saving one under autocast: in fp16 too, with numbers above its range."""
    torch.manual_seed(0)
    layer = INLDynamics(16, controller_size=8)
    for precision, size in (("bf16", 1.0), ("fp16", 1e5)):
        h, v = torch.randn(2, 5, 16) * size, torch.randn(2, 5, 16)
        found = []
        for compiling in (False, True):
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
            with treadle.autocast(precision):
                found.append(layer(h, v))
        for own, plain in zip(*found):
            assert bool(own.isfinite().all())
            torch.testing.assert_close(plain, own, atol=1e-5, rtol=1e-5)


def test_names_in_messages_are_those_that_are_typed() -> None:
    with pytest.raises(ConfigError, match="lower dynamics_beta or raise beta_max"):
        treadle.build("inl", vocab_size=16, hidden_size=16, num_layers=1, num_heads=1, dynamics_beta=3.0)
    assert math.isfinite(float(INLDynamics(8, step=1e-3, beta_max=1900.0, beta=1000.0).controller_out.bias.detach().sum()))  # type: ignore[union-attr]
