"""A start that compiles nothing loads no compiler, and what is made without it is the same."""

from __future__ import annotations

import subprocess
import sys

import torch

from treadle.ops.quick_start import empty_on, shapes_only, stepping_without_compiler

PROGRAM = """
import sys, torch
from treadle.models.base import build
from treadle.training.optim import Optimizers
from treadle.training.settings import OptimSettings
model = build("transformer", vocab_size=16, hidden_size=16, num_layers=1, num_heads=2)
for name in ("adamw", "muon"):
    optimizers = Optimizers(model, OptimSettings(name=name))
    for _, parameter in optimizers.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    optimizers.inner[0].state_dict()
print(sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
"""


def test_a_model_and_its_optimisers_load_no_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]


def test_the_step_without_wrappers_is_torchs_and_calls_hooks() -> None:
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2)]
    kinds = (torch.optim.AdamW, stepping_without_compiler(torch.optim.AdamW))
    made = [kind([weight], lr=0.1, weight_decay=0.1) for kind, weight in zip(kinds, weights)]
    called: list[int] = []
    made[1].register_step_post_hook(lambda *_: called.append(1))
    for _ in range(3):
        for optimizer, weight in zip(made, weights):
            weight.grad = weight.detach().sin()
            optimizer.step()
    assert torch.equal(*weights) and called == [1, 1, 1]
    assert isinstance(made[1], torch.optim.AdamW)
    made[1].load_state_dict(made[0].state_dict())
    assert not made[1].param_groups[0]["params"][0].grad_fn


def test_shapes_only_fills_nothing_outside_the_meta_device() -> None:
    with shapes_only():
        linear, here = torch.nn.Embedding(3, 4), torch.zeros(2, 2, device="cpu")
        torch.nn.init.normal_(here)
    assert linear.weight.is_meta and here.abs().sum() > 0
    turned = torch.empty(3, 5, dtype=torch.bfloat16, device="meta").t()
    assert (empty_on("cpu", turned).stride(), empty_on("cpu", turned).dtype) == ((1, 5), torch.bfloat16)
