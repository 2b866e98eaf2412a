"""Changes weights when it steps: SOAP, Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SOAP(torch.optim.Optimizer):
    """SOAP (Vyas et al. 2024, arXiv 2409.11321, algorithm 3) for matrices [m, n].

    L, R: running means of G G^T and G^T G; Q_L, Q_R: their eigenvectors, refreshed every `precondition_frequency` steps by one
    power iteration and a QR decomposition. Adam's moments are those of Q_L^T G Q_R, and the step is turned back. The first
    step only makes the bases. Weight decay is decoupled. State: m n + n n + 2 (m m + n n) + 1 numbers a matrix.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 3e-3, betas: tuple[float, float] = (0.95, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.01, precondition_frequency: int = 10,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "precondition_frequency": precondition_frequency}
        super().__init__(params, defaults)
        if any(p.dim() != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("SOAP steps matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient; takes no closure."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad.float(), group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            state["left"], state["right"] = gradient @ gradient.T, gradient.T @ gradient
            state["left_basis"], state["right_basis"] = _eigenvectors(state["left"]), _eigenvectors(state["right"])
            return
        state["step"] = int(state["step"]) + 1  # a tensor where it comes from a checkpoint
        step, left, right = state["step"], state["left_basis"], state["right_basis"]
        turned = left.T @ gradient @ right
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].lerp_(turned.square(), 1 - second)
        mean = left.T @ state["exp_avg"] @ right
        mean /= 1 - first**step
        scale = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_((left @ (mean / scale) @ right.T).to(parameter.dtype), alpha=-group["lr"])
        state["left"].lerp_(gradient @ gradient.T, 1 - second)
        state["right"].lerp_(gradient.T @ gradient, 1 - second)
        if step % group["precondition_frequency"] == 0:
            state["left_basis"] = torch.linalg.qr(state["left"] @ left).Q.contiguous()  # as a checkpoint gives it back
            state["right_basis"] = torch.linalg.qr(state["right"] @ right).Q.contiguous()


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix [n, n], those of the largest eigenvalues first, as power iteration orders them."""
    size = len(matrix)
    return torch.linalg.eigh(matrix + 1e-30 * torch.eye(size, dtype=matrix.dtype, device=matrix.device)).eigenvectors.flip(1).contiguous()
