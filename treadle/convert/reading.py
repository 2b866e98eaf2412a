"""What a foreign configuration says, in treadle's words, and what treadle has no word for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treadle.settings import shown

NO_KEY = "no key of treadle says it"
SHARE_WITHOUT_STEPS = "a share needs a number of steps; give optim.warmup_steps (2% of the run until then)"


def of_steps(share: float, steps: int) -> int:
    """A share of a number of steps, one at least."""
    return max(1, round(share * steps))


def listed(words: Sequence[str]) -> str:
    """("csv", "jsonl", "wandb") -> "csv, jsonl and wandb"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


@dataclass
class Reading:
    """A configuration on its way to a recipe. Keys are dotted; values are as a recipe takes them."""

    kind: str
    table: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, str] = field(default_factory=dict)  # our key -> what it was called there, for the comment beside it
    left: list[str] = field(default_factory=list)  # "name = value: why it has no equivalent"
    assumed: list[str] = field(default_factory=list)  # what was decided for the user
    missing: list[str] = field(default_factory=list)  # what the user must set, or another model is trained than the file means
    blanks: dict[str, list[str]] = field(default_factory=dict)  # section -> its commented lines, to be filled in
    start: str | None = None  # the model to start from: --from

    def put(self, key: str, value: Any, name: str = "") -> None:
        """One value under its name here."""
        self.table[key] = value
        if name:
            self.theirs[key] = name

    def leave(self, name: str, value: Any, why: str) -> None:
        """One value that no key here holds."""
        self.left.append(f"{name} = {shown(value)}: {why}")

    def warm_up(self, name: str, share: float, steps: int | None, called: str) -> None:
        """The warm-up as a share of the run's steps, where they are known; called: what the comment beside it says."""
        if steps is None:
            self.leave(name, share, SHARE_WITHOUT_STEPS)
        else:
            self.put("optim.warmup_steps", of_steps(share, steps), called)

    def leave_computed(self, computed: dict[str, int]) -> None:
        """Names whose values only running the script could tell."""
        for name, line in computed.items():
            self.left.append(f"{name}: is computed when the script runs (line {line}); write its value into the recipe")
