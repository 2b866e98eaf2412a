"""Muon in fp32 is Muon in bf16, to bf16's rounding, and takes over its state; NorMuon moves every output alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from treadle.training.muon import Muon, NorMuon, orthogonalized

SHAPES = [(24, 24), (16, 48), (48, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonalized(matrix)
    assert found.shape == shape and found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert float(torch.linalg.matrix_norm(found - left @ right)) < 0.35 * min(shape) ** 0.5


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(number))) for number, shape in enumerate(SHAPES)]


def stepped(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], steps: range) -> list[Tensor]:
    for step in steps:
        for number, weight in enumerate(trained):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + number))
        trained[0].grad = None if step == 1 else trained[0].grad  # a weight that no row of a step reached
        optimizer.step()
    return [weight.detach().clone() for weight in trained]


@pytest.mark.parametrize("emulated", [True, False])
def test_it_steps_as_torch_does(emulated: bool) -> None:
    ours, theirs, begun = weights(), weights(), weights()
    reference = torch.optim.Muon([{"params": theirs, "weight_decay": 0.2}], lr=0.05, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon([{"params": ours, "weight_decay": 0.2}], lr=0.05, momentum=0.9)
    optimizer.emulated = emulated
    for was, got, wanted in zip(begun, stepped(optimizer, ours, range(3)), stepped(reference, theirs, range(3))):
        moved = float((wanted - was.detach()).norm())
        assert float((got - wanted).norm()) < (0.02 * moved if emulated else 1e-9)
    for one, other in zip(ours, theirs):
        assert torch.equal(optimizer.state[one]["momentum_buffer"], reference.state[other]["momentum_buffer"])


def test_a_state_goes_from_one_kind_of_processor_to_the_other() -> None:
    ours, theirs = weights(), weights()
    reference = torch.optim.Muon(theirs, lr=0.05, adjust_lr_fn="match_rms_adamw")
    optimizer = Muon(ours, lr=0.05, momentum=0.95)
    optimizer.emulated = True
    stepped(reference, theirs, range(2))
    with torch.no_grad():
        for one, other in zip(ours, theirs):
            one.copy_(other)
    optimizer.load_state_dict(reference.state_dict())
    for got, wanted in zip(stepped(optimizer, ours, range(2, 3)), stepped(reference, theirs, range(2, 3))):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.01)


@pytest.mark.parametrize("emulated", [True, False])
def test_normuon_evens_muons_update(emulated: bool) -> None:
    """Against the update written out: momentum, orthogonalised; rows over the root of their mean square; the length that it had, times
    Muon's 0.2 sqrt(max(M, N))."""
    trained, rate, first, second, decay = weights(), 0.05, 0.9, 0.95, 0.2
    optimizer = NorMuon([{"params": trained, "weight_decay": decay}], lr=rate, momentum=first, second_momentum=second)
    optimizer.emulated = emulated
    expected = [weight.detach().clone() for weight in trained]
    momenta, means = [torch.zeros_like(w) for w in expected], [torch.zeros(w.shape[0]) for w in expected]
    for step in range(4):
        for number, weight in enumerate(trained):
            grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + number))
            weight.grad = grad * torch.linspace(0.01, 3, weight.shape[0])[:, None]  # outputs of very different gradients
            momenta[number] = first * momenta[number] + (1 - first) * weight.grad
            moved = orthogonalized((1 - first) * weight.grad + first * momenta[number], torch.float32 if emulated else torch.bfloat16).float()
            means[number] = second * means[number] + (1 - second) * (moved**2).mean(1)
            evened = moved / means[number].sqrt()[:, None]
            evened *= moved.norm() / evened.norm() * 0.2 * max(weight.shape) ** 0.5
            expected[number] = expected[number] * (1 - rate * decay) - rate * evened
        optimizer.step()
    for got, wanted in zip(trained, expected):
        torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=1e-4 if emulated else 2e-3)  # last bits grow in the iterations


def test_normuon_moves_outputs_alike() -> None:
    """Rows whose gradients are a thousandth of the others' move as far; by Muon they move less."""
    spread = {}
    for kind, more in ((Muon, {}), (NorMuon, {"second_momentum": 0.95})):
        weight = nn.Parameter(torch.zeros(32, 16))
        optimizer = kind([weight], lr=1.0, momentum=0.9, **more)  # type: ignore[arg-type]
        weight.grad = torch.randn(32, 16, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 0, 32)[:, None]
        optimizer.step()
        lengths = weight.detach().norm(dim=1)
        spread[kind] = float(lengths.max() / lengths.min())
    assert spread[NorMuon] < 1.01 and spread[Muon] > 3
