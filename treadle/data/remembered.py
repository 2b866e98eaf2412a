"""What the data of a run was made of, kept in the cache by its fingerprint, so that a later start can say what is another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from treadle.files import write_atomically

FUNCTION = "function:"  # begins the fingerprint of one; a file's is SIZE:HASH
MOST_SAID = 5


def keep(folder: Path, fingerprint: str, made_of: Mapping[str, str]) -> None:
    """made_of: fingerprints of files and functions, by name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{fingerprint[:32]}.json", json.dumps(made_of).encode())
    except OSError:
        pass  # a full or read-only cache: then the message is shorter


def difference(folder: Path, fingerprint: str, made_of: Mapping[str, str]) -> str:
    """What is another than in the data with this fingerprint, in words; "" where that is not known."""
    try:
        old: dict[str, str] = json.loads((folder / f"{fingerprint[:32]}.json").read_text(encoding="utf-8"))
        said = [f"{name} is gone" for name in old.keys() - made_of.keys()] + [f"{name} is new" for name in made_of.keys() - old.keys()]
        said += [_changed(name, old[name], made_of[name]) for name in old.keys() & made_of.keys() if old[name] != made_of[name]]
    except (OSError, ValueError, AttributeError):
        return ""
    return "; ".join(sorted(said)[:MOST_SAID]) + (f"; and {len(said) - MOST_SAID} more" if len(said) > MOST_SAID else "")


def _changed(name: str, before: str, now: str) -> str:
    if now.startswith(FUNCTION):
        return f"{name} has changed"
    return f"{name} has other content ({before.partition(':')[0]} bytes then, {now.partition(':')[0]} now)"
