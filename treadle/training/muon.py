"""Changes the hidden matrices, by Muon: torch's update, orthogonalised in fp32 where the processor has no bf16 products; or by NorMuon,
which also evens out how far each output moves."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from treadle.ops.precision import cpu_multiplies_bf16

EPSILON = 1e-7
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
ITERATIONS = 5


def orthogonalized(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[M, N] in `dtype`, near the U V^T of `matrix` [M, N] = U S V^T: Newton-Schulz iterations of the quintic, as torch.optim.Muon has
    them in bf16."""
    a, b, c = COEFFICIENTS
    wide = matrix.size(0) <= matrix.size(1)
    x = matrix.to(dtype) if wide else matrix.to(dtype).T
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Muon):
    """torch.optim.Muon with updates of AdamW's size (Liu et al. 2025, arXiv 2502.16982, eq. 4) and Nesterov's momentum. On a CPU
    without bf16 units its products are fp32: torch casts every matrix to bf16, whose products such a CPU emulates. On two AVX2 cores of
    an AMD EPYC that was 82% of the demo's step, 122 ms a matrix of 192 columns. State and hooks are those of torch.optim.Muon."""

    steps_as_torch = True  # where bf16 products are the device's own

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self.emulated = not cpu_multiplies_bf16()  # bf16 on the CPU

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; the value of `closure`, where there is one."""
        trained = [(group, p) for group in self.param_groups for p in group["params"]]
        if self.steps_as_torch and (not self.emulated or any(p.device.type != "cpu" for _, p in trained)):
            return inspect.unwrap(torch.optim.Muon.step)(self, closure)  # as ops/quick_start.stepping_without_compiler asks
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, weight in trained:
            if weight.grad is not None:
                self._update(weight, weight.grad, float(group["lr"]), float(group["momentum"]), float(group["weight_decay"]))
        return loss

    def _update(self, weight: Tensor, grad: Tensor, rate: float, momentum: float, weight_decay: float) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
        average = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        dtype = torch.float32 if self.emulated and weight.device.type == "cpu" else torch.bfloat16
        update = self._evened(orthogonalized(grad.lerp(average, momentum), dtype), state)
        weight.mul_(1 - rate * weight_decay)
        weight.add_(update.to(weight.dtype), alpha=-rate * 0.2 * math.sqrt(max(weight.shape)))

    def _evened(self, update: Tensor, state: dict[str, Any]) -> Tensor:
        return update


class NorMuon(Muon):
    """Muon, each output's row of its update divided by the root of the running mean of the row's squares (Li et al. 2025, arXiv
    2510.05491). An orthogonalised update moves some outputs much further than others; so all move alike. Unlike the paper's algorithm 1 it
    has Nesterov's momentum, as Muon here, and the whole is scaled back to the length that Muon's update has, not to one fixed length.
    State beside Muon's: fp32 [M, 1] for a matrix [M, N]; `second_momentum` is the mean's decay."""

    steps_as_torch = False

    def __init__(self, params: Any, lr: float, momentum: float, second_momentum: float) -> None:
        super().__init__(params, lr, momentum)
        self.second_momentum = second_momentum

    def _evened(self, update: Tensor, state: dict[str, Any]) -> Tensor:
        update = update.float()
        squares = update.square().mean(1, keepdim=True)
        if "second_momentum_buffer" not in state:
            state["second_momentum_buffer"] = torch.zeros_like(squares)
        # The mean starts at 0; how much too small that makes it at first is the same for every row, so the length takes it out again.
        mean = state["second_momentum_buffer"].lerp_(squares, 1 - self.second_momentum)
        evened = update / (mean.sqrt() + EPSILON)
        return evened * (update.norm() / evened.norm().clamp(min=EPSILON))
