"""Shapes of equal size: the width (and where it helps the MLP or the depth) that gives an architecture so many parameters.

Nothing is trained and nothing allocated: each candidate is counted on the meta device. Widths stay multiples that matrix products
like; what the caller fixes stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from treadle.errors import ConfigError
from treadle.models.base import Model, parameter_count
from treadle.models.catalogue import MODELS

TOLERANCE = 0.02  # of the wanted number of parameters
GRANULARITY = (32, 16, 8, 4, 2, 1)  # of a width, from what kernels like most to whatever fits
HEAD = (8, 4, 2, 1)  # of a head's width; rotary positions need it even, other mixers do not
MLP_STEP = 8
MLP_RATIOS = (1.5, 6.0)  # of the MLP's width to the hidden width: between these no model is out of proportion
DEEPER = (0, 1, -1, 2, -2, 3, -3)  # layers more than asked for, where no width alone will do
WIDEST = 1 << 15


@dataclass(frozen=True)
class Sized:
    """Keys of a model and what they come to."""

    arch: str
    keys: dict[str, Any]
    parameters: int


class _Search:
    def __init__(self, arch: str, fixed: Mapping[str, Any], preferred: Mapping[str, Any], wanted: int, tolerance: float) -> None:
        self.arch = MODELS.canonical(arch)
        self.cls: type[Model] = MODELS.get(self.arch)
        fields = self.cls.Config.model_fields
        self.fixed = dict(fixed)
        self.keys = {**{k: v for k, v in preferred.items() if k in fields}, **self.fixed}
        self.defaults = self.cls.Config.with_preset(None, **self.keys).model_dump()
        self.wanted, self.tolerance = wanted, tolerance
        self.nearest: Sized | None = None
        self.problem = ""

    def may_vary(self, key: str) -> bool:
        return key in self.cls.Config.model_fields and key not in self.fixed

    def count(self, keys: dict[str, Any]) -> int | None:
        """Parameters, or None for a shape that the architecture refuses."""
        try:
            return parameter_count(self.cls, self.cls.Config.with_preset(None, **keys))
        except (ConfigError, ValueError) as problem:
            self.problem = str(problem)
            return None

    def fits(self, keys: dict[str, Any]) -> Sized | None:
        count = self.count(keys)
        if count is None:
            return None
        found = Sized(self.arch, keys, count)
        if self.nearest is None or abs(count - self.wanted) < abs(self.nearest.parameters - self.wanted):
            self.nearest = found
        return found if abs(count - self.wanted) <= self.tolerance * self.wanted else None

    def widths(self, keys: dict[str, Any], step: int) -> Iterator[dict[str, Any]]:
        """The shapes below and above the wanted size whose width is a multiple of `step`, the nearer first."""
        low, high = 1, 2
        while high * step < WIDEST and (self.count(self.with_width(keys, high * step)) or 0) < self.wanted:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if (self.count(self.with_width(keys, middle * step)) or 0) < self.wanted:
                low = middle
            else:
                high = middle
        around = [self.with_width(keys, times * step) for times in (low, high)]
        yield from sorted(around, key=lambda shape: abs((self.count(shape) or 0) - self.wanted))

    def with_width(self, keys: dict[str, Any], width: int) -> dict[str, Any]:
        """A model of several widths (a hierarchy) keeps their proportions, in steps of the outermost's."""
        if "hidden_sizes" not in self.defaults:
            return {**keys, "hidden_size": width}
        sizes = list(self.defaults["hidden_sizes"])
        even = 4 if width % 4 == 0 else 2
        return {**keys, "hidden_sizes": [max(even, round(size * width / sizes[0] / even) * even) for size in sizes]}

    def steps(self) -> list[int]:
        heads = self.defaults.get("num_heads") or 1
        return [heads * size for size in HEAD] if heads > 1 else list(GRANULARITY)

    def with_mlp(self, keys: dict[str, Any]) -> dict[str, Any] | None:
        """The same with the MLP's width that makes up for what is missing; None where it would be out of proportion."""
        hidden = keys.get("hidden_size", self.defaults.get("hidden_size"))
        at, wider = (self.count({**keys, "intermediate_size": size}) for size in (hidden, hidden + MLP_STEP))
        if at is None or wider is None or wider <= at:
            return None
        size = hidden + MLP_STEP * round((self.wanted - at) / (wider - at))
        return {**keys, "intermediate_size": size} if MLP_RATIOS[0] <= size / hidden <= MLP_RATIOS[1] else None

    def other_inner_widths(self, keys: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Of a hierarchy: the same outer widths around an innermost one from as wide as its neighbour to twice that."""
        sizes = keys.get("hidden_sizes") or []
        if len(sizes) > 1:
            around = sorted(range(sizes[-2], 2 * sizes[-2] + 1), key=lambda size: (size % 2, abs(size - sizes[-1])))
            yield from ({**keys, "hidden_sizes": [*sizes[:-1], size]} for size in around)

    def shapes(self) -> Iterator[dict[str, Any]]:
        """Candidates, the most natural first."""
        width = "hidden_sizes" if "hidden_sizes" in self.defaults else "hidden_size"
        depths = [self.keys]
        if self.may_vary("num_layers"):
            layers = self.defaults["num_layers"]
            depths = [{**self.keys, "num_layers": layers + more} for more in DEEPER if layers + more > 0]
        for keys in depths:
            yield keys
            if not self.may_vary(width):
                if self.may_vary("intermediate_size") and (mlp := self.with_mlp(keys)) is not None:
                    yield mlp
                continue
            for step in self.steps():
                for shape in self.widths(keys, step):
                    yield shape
                    yield from self.other_inner_widths(shape)
                    if self.may_vary("intermediate_size") and (mlp := self.with_mlp(shape)) is not None:
                        yield mlp


def equal_parameters(
    arch: str, parameters: int, fixed: Mapping[str, Any] | None = None, preferred: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> Sized:  # fmt: skip
    """The keys of `arch` that come to `parameters`, to a share of `tolerance`. fixed: keys that stay; preferred: keys to begin with
    (those that the architecture has). ConfigError, naming the nearest shape, where none does."""
    search = _Search(arch, fixed or {}, preferred or {}, parameters, tolerance)
    for shape in search.shapes():
        if (found := search.fits(shape)) is not None:
            return found
    if search.nearest is None:
        raise ConfigError(f"{search.arch}: no shape is possible with {dict(fixed or {})}: {search.problem}")
    near = search.nearest
    shown = {key: near.keys[key] for key in ("hidden_size", "hidden_sizes", "num_layers", "intermediate_size") if key in near.keys}
    raise ConfigError(f"{search.arch}: no shape has {parameters:,} parameters to {tolerance:.0%}; the nearest ({shown}) has "
                      f"{near.parameters:,}. Ask for {near.parameters} parameters, or fix fewer of its keys")  # fmt: skip
