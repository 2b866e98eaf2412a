"""Muon in fp32 is Muon in bf16, to bf16's rounding, and takes over its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from treadle.training.muon import Muon, orthogonalized

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
