"""INL dynamics: a layer that pulls its input towards a learned equilibrium with a velocity that runs over depth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from treadle.errors import ConfigError
from treadle.ops.dynamics import Limits, dynamics, gains, products_dtype


@dataclass
class Steered:
    """What one layer did with a batch: mu [D] as it was used, the largest beta of any token, the mean square of v'."""

    mu: Tensor
    beta_max: Tensor
    velocity_square: Tensor


class INLDynamics(nn.Module):
    """h, v [B, T, D] -> h', v' [B, T, D]; equations in ops/dynamics.py and docs/dynamics.md.

    Each token's gains come from a controller Linear(2D, controller_size) -> SiLU -> Linear(controller_size, 3D); `lite` has
    no controller: alpha, beta and gate are the given constants, and only mu is learned. v belongs to depth: give zeros to the
    first layer of a stack and each layer's v' to the next. |h' - h| <= step velocity_max for every input. ConfigError for
    constants that contradict each other or with which a layer could swing itself up.
    """

    read_in_place = ("controller_in", "controller_out")  # as TokenMixer's

    def __init__(
        self, width: int, *, lite: bool = False, controller_size: int = 64, alpha: float = 0.9, beta: float = 0.1,
        gate: float = 0.5, step: float = 0.1, beta_max: float = 2.0, velocity_max: float = 10.0, mu_min: float = 0.0,
        mu_max: float = 2.0, mu_initial: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if problem := contradiction(alpha, beta, gate, step, beta_max, velocity_max, mu_min, mu_max, mu_initial):
            raise ConfigError(problem)
        self.limits = Limits(step, beta_max, velocity_max, mu_min, mu_max)
        self.alpha, self.beta, self.gate, self.mu_initial = alpha, beta, gate, mu_initial
        self.mu = nn.Parameter(torch.empty(width))
        self.controller_in = None if lite else nn.Linear(2 * width, controller_size)
        self.controller_out = None if lite else nn.Linear(controller_size, 3 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew from torch's own generator, each as `initial` says it starts."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                start = self.initial(name)
                if isinstance(start, Tensor):
                    parameter.copy_(start)
                elif parameter.dim() == 1:
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, 0.02 if start is None else start)

    def initial(self, name: str) -> float | Tensor | None:
        """How a parameter starts (Model.initial); None: as any matrix or bias of the model. The second product starts so small
        that every gain starts at its constant."""
        if name == "mu":
            return torch.full(self.mu.shape, self.mu_initial)
        if name == "controller_out.weight":
            return 0.01
        if name == "controller_out.bias":
            logits = (_logit(self.alpha), self.beta + math.log(-math.expm1(-self.beta)), _logit(self.gate))
            return torch.tensor(logits).repeat_interleave(len(self.mu))
        return None

    def flops(self) -> int:
        """Of one token."""
        if self.controller_in is None or self.controller_out is None:
            return 0
        return 2 * (self.controller_in.weight.numel() + self.controller_out.weight.numel())

    def forward(self, h: Tensor, v: Tensor, record: list[Steered] | None = None) -> tuple[Tensor, Tensor]:
        """h, v [B, T, D] -> h', v' [B, T, D]; `record` gets how each position was steered."""
        limits = self.limits
        if self.controller_in is None or self.controller_out is None:
            equilibrium = self.mu.clamp(limits.mu_min, limits.mu_max)
            velocity = torch.sub(self.alpha * v, h - equilibrium, alpha=self.beta)
            velocity = velocity.clamp(-limits.velocity_max, limits.velocity_max)
            moved = torch.add(h, velocity, alpha=limits.step * self.gate)
        else:
            one, two = self.controller_in, self.controller_out
            moved, velocity = dynamics(h, v, self.mu, one.weight, one.bias, two.weight, two.bias, limits)
        if record is not None:
            with torch.no_grad():
                equilibrium = self.mu.clamp(limits.mu_min, limits.mu_max).float()
                record.append(Steered(equilibrium, self.gains(h, v)[1].max(), velocity.float().square().mean()))
        return moved, velocity

    def gains(self, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, beta, gate), [B, T, D] each, that the layer uses for h, v [B, T, D]."""
        if self.controller_in is None or self.controller_out is None:
            return tuple(torch.full(h.shape, x, device=h.device) for x in (self.alpha, self.beta, self.gate))  # type: ignore[return-value]
        products = products_dtype(h if h.dtype == v.dtype else v)
        one, two = self.controller_in, self.controller_out
        with torch.autocast(h.device.type, enabled=False):
            found = gains(h.flatten(0, -2), v.flatten(0, -2), one.weight, one.bias, two.weight, two.bias,
                          self.limits.beta_max, products)  # fmt: skip
        return tuple(x.view(h.shape) for x in found)  # type: ignore[return-value]


def contradiction(
    alpha: float, beta: float, gate: float, step: float, beta_max: float, velocity_max: float, mu_min: float, mu_max: float,
    mu_initial: float, prefix: str = "",
) -> str | None:  # fmt: skip
    """What is wrong with constants, in one line that says what to type; None where nothing is. prefix: of the names as
    they are typed. With step beta_max < 2 the bound of stability, step gate beta < 2 (1 + alpha), holds for every gain that a controller can choose."""
    if not 0.0 < alpha < 1.0 or not 0.0 < gate < 1.0:
        return f"{prefix}alpha = {alpha} and {prefix}gate = {gate} must lie between 0 and 1, as .9 and .5 do"
    if not 0.0 < beta <= beta_max:
        return f"{prefix}beta = {beta} must be above 0 and not above beta_max = {beta_max}; lower {prefix}beta or raise beta_max"
    if step <= 0.0 or velocity_max <= 0.0:
        return f"{prefix}step ({step}) and velocity_max ({velocity_max}) must be above 0, as .1 and 10 are"
    if step * beta_max >= 2.0:
        return f"{prefix}step = {step} with beta_max = {beta_max} may swing itself up; use a {prefix}step below {2.0 / beta_max:.3g}"
    if not mu_min <= mu_initial <= mu_max:
        return f"mu_initial = {mu_initial} must lie between mu_min = {mu_min} and mu_max = {mu_max}; give one that does"
    return None


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share))


def statistics(steered: list[Steered]) -> dict[str, float]:
    """mu_mean, mu_std, mu_min, mu_max over all layers and features; beta_max_seen over all layers, tokens and features;
    velocity_rms, the root mean square of v' over the same."""
    if not steered:
        return {}
    mu = torch.stack([one.mu for one in steered])
    velocity = torch.stack([one.velocity_square for one in steered]).mean().sqrt()
    return {"mu_mean": float(mu.mean()), "mu_std": float(mu.std(unbiased=False)), "mu_min": float(mu.min()),
            "mu_max": float(mu.max()), "beta_max_seen": float(max(one.beta_max for one in steered)),
            "velocity_rms": float(velocity)}  # fmt: skip
