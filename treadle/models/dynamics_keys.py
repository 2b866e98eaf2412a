"""The keys of INL dynamics (layers/dynamics.py) that models of blocks inherit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from treadle.layers.dynamics import INLDynamics, contradiction
from treadle.settings import Settings, option

SWITCH = {"true": "full", "on": "full", "inl": "full", "yes": "full", "false": "none", "off": "none", "no": "none"}


class DynamicsKeys(Settings):
    """One dynamics layer a block, or none."""

    dynamics: Literal["none", "full", "lite"] = option(
        "none", aliases=("use_inl_dynamics", "inl_dynamics", "use_dynamics", "use_inl"), spellings=SWITCH
    )
    """INL dynamics in every block: full (each token chooses its gains), lite (constant gains, only mu is learned)."""

    dynamics_placement: Literal["attention", "post"] = option(
        "attention", aliases=("inl_placement",), spellings={"attn": "attention", "mlp": "post"}
    )
    """What the dynamics move: the mixer's output before it is added (attention), or the residual stream after the MLP."""

    dynamics_step: float = option(0.1, aliases=("dynamics_dt", "inl_dt", "dt"), gt=0.0)
    """Share dt of a velocity that is added to h in one block."""

    dynamics_controller_size: int = option(64, aliases=("dynamics_controller_hidden", "controller_hidden"), ge=1)
    """Width inside the controller that chooses a token's gains (full)."""

    dynamics_alpha: float = option(0.9, aliases=("init_alpha", "inl_alpha"), gt=0.0, lt=1.0)
    """Share of a velocity that the next block keeps: where it starts (full), or always (lite)."""

    dynamics_beta: float = option(0.1, aliases=("init_beta", "inl_beta"), gt=0.0)
    """Strength of the pull towards mu: where it starts (full), or always (lite)."""

    dynamics_gate: float = option(0.5, aliases=("init_gate", "inl_gate"), gt=0.0, lt=1.0)
    """Share of the step that is taken: where it starts (full), or always (lite)."""

    beta_max: float = option(2.0, aliases=("dynamics_beta_max",), gt=0.0)
    """No token's beta is larger; dynamics_step x beta_max stays below 2."""

    velocity_max: float = option(10.0, aliases=("dynamics_velocity_max", "max_velocity"), gt=0.0)
    """No entry of a velocity is larger, so that no block moves an entry by more than dynamics_step x velocity_max."""

    mu_min: float = option(0.0, aliases=("dynamics_mu_min",))
    """The equilibrium mu is used no lower than this."""

    mu_max: float = option(2.0, aliases=("dynamics_mu_max",))
    """The equilibrium mu is used no higher than this."""

    mu_initial: float = option(1.0, aliases=("mu_init", "init_mu", "mu_start"))
    """Where every entry of mu starts; it has no weight decay."""

    @model_validator(mode="after")
    def _dynamics_fit(self) -> DynamicsKeys:
        if problem := contradiction(self.dynamics_alpha, self.dynamics_beta, self.dynamics_gate, self.dynamics_step,
                                    self.beta_max, self.velocity_max, self.mu_min, self.mu_max, self.mu_initial, prefix="dynamics_"):  # fmt: skip
            raise ValueError(problem)
        return self

    def make_dynamics(self) -> INLDynamics | None:
        """The layer of one block; None where dynamics are off."""
        if self.dynamics == "none":
            return None
        keys: dict[str, Any] = {"alpha": self.dynamics_alpha, "beta": self.dynamics_beta, "gate": self.dynamics_gate}
        return INLDynamics(
            self.hidden_size, lite=self.dynamics == "lite", controller_size=self.dynamics_controller_size,  # type: ignore[attr-defined]
            step=self.dynamics_step, beta_max=self.beta_max, velocity_max=self.velocity_max, mu_min=self.mu_min,
            mu_max=self.mu_max, mu_initial=self.mu_initial, **keys,
        )  # fmt: skip
