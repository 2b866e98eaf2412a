"""What a foreign configuration says, in treadle's words, and what treadle has no word for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from treadle.settings import shown


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

    def leave_computed(self, computed: dict[str, int]) -> None:
        """Names whose values only running the script could tell."""
        for name, line in computed.items():
            self.left.append(f"{name}: is computed when the script runs (line {line}); write its value into the recipe")
