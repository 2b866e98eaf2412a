"""The update that a GPU gets before anybody knows the loss is the one that the host would have chosen. torch's fused AdamW takes the
same numbers on a CPU, so that this runs everywhere; tests/contracts/test_on_a_gpu.py has it there."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.conftest import make
from treadle.models.base import Model
from treadle.objectives.base import ModelWithObjective
from treadle.objectives.next_token import NextToken
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings
from treadle.training.step import Stepper


def stepper(launches: bool, max_grad_norm: float, precision: str, **optim: object) -> tuple[Model, Stepper]:
    model = make("transformer", 0)
    made = Stepper(ModelWithObjective(model, NextToken()), Optimizers(model, OptimSettings(**{"learning_rate": 1e-2, **optim})), seed=0,
                   precision=precision, max_grad_norm=max_grad_norm, loss_weights={})  # fmt: skip
    assert not made.launches
    made.launches = launches
    return model, made


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 1e6])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_update_is_the_same(max_grad_norm: float, precision: str) -> None:
    found = []
    for launches in (False, True):
        model, made = stepper(launches, max_grad_norm, precision)
        batch = type(model).example(model.config, 2, 16)
        results = [made.run(step, [batch], 1e-2) for step in range(3)]
        found.append(([r.loss for r in results], [r.grad_norm for r in results], list(model.parameters())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    for one, other in zip(found[0][2], found[1][2]):
        torch.testing.assert_close(one, other, atol=1e-4 if precision == "fp16" else 1e-5, rtol=1e-3)


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_does() -> None:
    model, made = stepper(True, 1.0, "fp32")
    batch = type(model).example(model.config, 2, 16)
    made.run(0, [batch], 1e-2)
    weights = [p.detach().clone() for p in model.parameters()]
    state = {name: t.clone() for name, t in made.optimizers.state_tensors().items()}
    bad = next(p for p in model.parameters() if p.dim() == 2)
    kept = bad.detach().clone()
    with torch.no_grad():
        bad[3] = float("nan")
    assert made.run(1, [batch], 1e-2).skipped == "nonfinite"
    with torch.no_grad():
        bad.copy_(kept)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))
    assert all(torch.equal(t, state[name]) for name, t in made.optimizers.state_tensors().items())
    assert made.run(1, [batch], 1e-2).skipped == "" and not torch.equal(weights[0], next(iter(model.parameters())))


def test_who_has_a_say_is_asked_first() -> None:
    model, made = stepper(True, 1.0, "fp32")
    batch = type(model).example(model.config, 2, 16)
    weights = [p.detach().clone() for p in model.parameters()]
    assert made.run(0, [batch], 1e-2, veto=lambda loss: True).skipped == "spike"
    made.run(0, [batch], 1e-2, update=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


@pytest.mark.parametrize("optim, wanted", [({}, True), ({"name": "muon"}, False), ({"name": "soap"}, False), ({"ema": 0.9}, False)])
def test_only_an_optimiser_that_can_leave_a_step_out_does(optim: dict[str, object], wanted: bool) -> None:
    assert stepper(False, 1.0, "fp32", **optim)[1].optimizers.decide_on_device is wanted
