"""The keys of the three tasks: what [task] holds (also written [collatz])."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from treadle.collatz.arithmetic import Map, number, spelled
from treadle.settings import Settings, option


def _exact(value: Any) -> Any:
    """A number as people write it, kept as text: a TOML integer ends at 2^63, a float is not exact."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("write an integer, or text such as '2^68'")
    return spelled(number(value)).replace(",", "")


HARD = ("above_record", "three_mod_four", "dense")
KINDS = ("sequential", *HARD, "uniform")
RECORD = 1 << 68  # hard numbers begin here
LARGEST = 126  # bits: two limbs hold a number, and what labels need fits beside it


class NumberKeys(Settings):
    """Which numbers the rows begin with."""

    called: ClassVar[str] = "collatz"

    hard_share: float = option(0.5, ge=0.0, le=1.0)
    """Share of hard numbers: 2^68 + U(0, 10^12), the same forced to 3 mod 4, and numbers of 70 to 119 bits three quarters of
    which are ones, a third each. The others are counted up from `start`."""

    mixture: dict[str, float] = option({})
    """Shares of kinds by name instead: sequential, above_record, three_mod_four, dense, uniform."""

    start: str = option("2^40")
    """Where sequential numbers begin."""

    uniform_bits: int = option(68, ge=8, le=LARGEST - 4)
    """Numbers of the kind uniform are drawn from [2^b, 2^(b+1)) with this b."""

    search: str | None = option(None, change="free")
    """Search for cycles and numbers that do not come down, from this number upward, in a process of low priority beside the
    training; stops and goes on with it."""

    search_map: str = option("3x+1", change="free")
    """The map that is searched."""

    search_workers: int = option(1, change="free", ge=1)
    """Threads of the search."""

    anomaly_deviations: float = option(8.0, change="free", gt=0.0)
    """A stopping time whose error lies this many deviations beyond the running mean is reported with its number."""

    anomaly_warmup: int = option(1000, change="free", ge=1)
    """Steps before errors are judged."""

    _exact_numbers = field_validator("start", "search", mode="before")(_exact)

    @field_validator("mixture")
    @classmethod
    def _kinds_are_known(cls, mixture: dict[str, float]) -> dict[str, float]:
        for name, share in mixture.items():
            if name not in KINDS:
                raise ValueError(f"mixture has {name!r}; there is: {', '.join(KINDS)}")
            if not 0 <= share < float("inf"):
                raise ValueError(f"mixture.{name} = {share} is no share: a number >= 0")
        if mixture and not sum(mixture.values()) > 0:
            raise ValueError("mixture has no share above 0")
        return mixture

    @model_validator(mode="after")
    def _numbers_fit(self) -> NumberKeys:
        if not 2 <= number(self.start) < 1 << (LARGEST - 4):
            raise ValueError(f"start = {self.start} has to be between 2 and 2^{LARGEST - 4}")
        Map.parse(self.search_map)
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Kind -> share, those with any."""
        given = self.mixture or {"sequential": 1 - self.hard_share, **dict.fromkeys(HARD, self.hard_share / 3)}
        total = sum(given.values())
        return {kind: given[kind] / total for kind in KINDS if given.get(kind, 0) > 0}


class ParityKeys(NumberKeys):
    """The multi-task model: the next step's parity, and the stopping time, from the parities so far."""

    length: int = option(32, aliases=("parities", "sequence_length"), ge=2, le=4096)
    """Parities in a row; trajectories that end within them are left out, so that the length of a row says nothing."""

    parity_steps: Literal["shortcut", "standard"] = option("shortcut")
    """What a step is: shortcut (3n + 1 and the halving that always follows, at once) or standard."""

    stopping_weight: float = option(1.0, ge=0.0, allow_inf_nan=False)
    """Weight of the stopping time's Huber loss."""

    step_weight: float = option(1.0, ge=0.0, allow_inf_nan=False)
    """Weight of the next step's cross-entropy."""


class DelayKeys(NumberKeys):
    """The stopping time from the digits of the number."""

    mixture: dict[str, float] = option({"uniform": 1.0})
    """Shares of kinds: sequential, above_record, three_mod_four, dense, uniform."""

    base: int = option(2, ge=2, le=1024)
    """The digits' base."""

    low_digits_first: bool = option(True)
    """The lowest digit stands first."""


class LongStepKeys(Settings):
    """The long step, sequence to sequence: odd n = 2^k m - 1 to what k odd steps and the halvings after them make of it."""

    called: ClassVar[str] = "collatz"

    base: int = option(24, ge=2, le=1024)
    """The digits' base."""

    largest: str = option("10^12")
    """Odd numbers up to here, uniformly."""

    _exact_number = field_validator("largest", mode="before")(_exact)

    @model_validator(mode="after")
    def _fits(self) -> LongStepKeys:
        if not 9 <= number(self.largest) <= 1 << 40:  # 3^k m <= (3/2)^40 2^40 fits 64 bits
            raise ValueError(f"largest = {self.largest} has to be between 9 and 2^40")
        return self
