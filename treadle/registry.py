"""Name -> class, for everything a user can choose by name.

A registry knows its built-in names as `module:attribute` strings, so listing them imports nothing heavy. Packages add
names through entry points (`treadle.<kind>`), users through `file.py:Class`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from treadle.errors import ConfigError

PREFERENCE = 0.1  # num_layers is nearer to num_workers (.67) than to num_blocks (.60), which an hnet has instead


def nearest(
    word: str, known: Iterator[str] | list[str], count: int = 3, *, preferred: Iterable[str] = (),
    meant: Mapping[str, str] | None = None, otherwise: str | None = None,
) -> str:  # fmt: skip
    """A 'did you mean' clause for `word`, or `otherwise` (default the list of what there is) when nothing is near.
    `preferred` names win over others that are a little nearer; `meant` says what to write for a name that is only another
    word for it."""
    preferred = set(preferred)
    known = sorted({*known, *preferred})
    matcher = difflib.SequenceMatcher(b=word)
    scored = []
    for name in known:
        matcher.set_seq1(name)
        scored.append((matcher.ratio() + PREFERENCE * (name in preferred), name))
    lowest = max(0.6, max((score for score, _ in scored), default=0.0) - 0.2)  # a sure guess needs no others beside it
    near = [name for score, name in sorted(scored, key=lambda one: (-one[0], one[1])) if score >= lowest]
    close = list(dict.fromkeys((meant or {}).get(name, name) for name in near))[:count]
    known = sorted({(meant or {}).get(name, name) for name in known})
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    if otherwise is not None:
        return otherwise
    shown = ", ".join(known[:40])
    return f"there is: {shown}"


class Registry:
    """The names of one kind of thing ('model', 'optimizer', ...) and how to import each."""

    def __init__(self, kind: str, builtin: dict[str, str], aliases: dict[str, str] | None = None) -> None:
        self.kind = kind
        self._places: dict[str, str] = dict(builtin)
        self._objects: dict[str, Any] = {}
        self._aliases = dict(aliases or {})
        self._entry_points_read = False

    def register(self, name: str, thing: Any = None) -> Callable[[Any], Any] | Any:
        """Adds `thing` under `name`; without `thing`, a decorator."""
        if thing is None:
            return lambda decorated: self.register(name, decorated)
        self._objects[name] = thing
        return thing

    def names(self) -> list[str]:
        """All names known now, sorted; imports none of them."""
        if not self._entry_points_read:
            self._entry_points_read = True
            for point in entry_points(group=f"treadle.{self.kind}"):
                self._places.setdefault(point.name, point.value)
        return sorted({*self._places, *self._objects})

    def canonical(self, name: str) -> str:
        """The registered spelling of `name` (case and '-' or '_' do not matter); ConfigError when unknown."""
        if _is_place(name):
            return name
        plain = name.lower().replace("-", "_")
        plain = self._aliases.get(plain, plain)
        if plain not in self.names():
            raise ConfigError(f"unknown {self.kind} {name!r}: {nearest(plain, self.names())}")
        return plain

    def get(self, name: str) -> Any:
        """The thing called `name`, imported on first use; `file.py:Class` and `package.module:Class` work too."""
        name = self.canonical(name)
        if name not in self._objects:
            self._objects[name] = _load_place(self._places.get(name, name))
        return self._objects[name]


def _is_place(name: str) -> bool:
    return bool(re.match(r"^(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*$", name))


def _load_place(place: str) -> Any:
    module_name, _, attribute = place.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name).resolve()
        if not path.is_file():
            raise ConfigError(f"{module_name} does not exist, so {attribute} cannot be loaded from it")
        unique = f"treadle_user_{path.stem}_{abs(hash(str(path)))}"
        if unique not in sys.modules:
            spec = importlib.util.spec_from_file_location(unique, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[unique] = module
            spec.loader.exec_module(module)
        module = sys.modules[unique]
    else:
        module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ConfigError(f"{module_name} has no {attribute}")
    return getattr(module, attribute)
