"""Are the goals of goals.toml met? A figure that is missing is neither met nor missed."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "goals.toml"


@dataclass(frozen=True)
class Verdict:
    """One goal on one machine."""

    name: str
    section: str
    wanted: str
    value: float | None
    outcome: str  # "met", "MISSED by 12%", "skipped (reason)"
    part: str  # of the bench, that measures it

    def text(self) -> str:
        figure = "" if self.value is None else f"{self.value:.3g}, "
        return f"{self.name}: {figure}goal {self.wanted}: {self.outcome}"

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def flat(parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`part: name` -> value over all parts; `part` alone -> why the whole part is missing."""
    values: dict[str, Any] = {}
    for part, found in parts.items():
        for name, value in found.items():
            values[part if name == part else f"{part}: {name}"] = value
    return values


def of_a_gpu(results: Path) -> dict[str, Any]:
    """Of the newest committed run on a GPU, where there is one."""
    for path in sorted(results.glob("gpu-*.json"), reverse=True):
        return flat(json.loads(path.read_text(encoding="utf-8"))["parts"])
    return {}


def names(file: Path = FILE) -> list[str]:
    """Of all goals, in their order."""
    return [goal["name"] for goal in tomllib.loads(file.read_text(encoding="utf-8"))["goal"]]


def judge(values: dict[str, Any], kind: str, file: Path = FILE) -> list[Verdict]:
    """A verdict on each goal that holds on a machine of this kind (`machine.kind`)."""
    said = []
    for goal in tomllib.loads(file.read_text(encoding="utf-8"))["goal"]:
        if kind not in goal.get("on", [kind]):
            continue
        least, most = goal.get("at_least"), goal.get("at_most")
        wanted = f"at least {least:g}" if least is not None else f"at most {most:g}"
        name, value = goal["value"], values.get(goal["value"])
        part = name.split(":")[0]
        if isinstance(value, (int, float)) and value == value:
            missed = value < least if least is not None else value > most
            off = abs(value / (least if least is not None else most) - 1)
            outcome = f"MISSED by {off:.{0 if off >= 0.01 else 1}%}" if missed else "met"
            said.append(Verdict(goal["name"], goal["section"], wanted, float(value), outcome, part))
        else:
            reason = value if isinstance(value, str) else values.get(part, "skipped (not measured)")
            said.append(Verdict(goal["name"], goal["section"], wanted, None, str(reason), part))
    return said
