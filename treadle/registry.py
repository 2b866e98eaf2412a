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
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from treadle.errors import ConfigError

USER_MODULE = "treadle_user_"  # begins the names of modules that are files of a user


def nearest(word: str, known: Iterator[str] | list[str], count: int = 3) -> str:
    """A 'did you mean' clause for `word`, or the list of what there is when nothing is near."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=count, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
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

    def name_of(self, cls: type) -> str:
        """The name by which `get` finds a class again."""
        for name in self.names():
            if self._objects.get(name) is cls or self._places.get(name) == f"{cls.__module__}:{cls.__qualname__}":
                return name
        return place_of(cls)

    def get(self, name: str) -> Any:
        """The thing called `name`, imported on first use; `file.py:Class` and `package.module:Class` work too."""
        name = self.canonical(name)
        if name not in self._objects:
            self._objects[name] = _load_place(self._places.get(name, name))
        return self._objects[name]


def place_of(cls: type) -> str:
    """FILE.py:CLASS or package.module:CLASS, by which a Registry finds a class again."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    importable = getattr(module, "__spec__", None) is not None and not cls.__module__.startswith(USER_MODULE)
    if importable and cls.__module__ != "__main__":
        return f"{cls.__module__}:{cls.__qualname__}"
    return f"{Path(file).resolve()}:{cls.__qualname__}" if file else f"{cls.__module__}:{cls.__qualname__}"


def _is_place(name: str) -> bool:
    return bool(re.match(r"^(.+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*$", name))


def load_file(path: Path) -> ModuleType:
    """A user's Python file as a module, executed once a process."""
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"{path} does not exist")
    unique = f"{USER_MODULE}{path.stem}_{abs(hash(str(path)))}"
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[unique] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[unique]
            raise
    return sys.modules[unique]


def _load_place(place: str) -> Any:
    module_name, _, attribute = place.rpartition(":")
    if module_name.endswith(".py"):
        if not Path(module_name).is_file():
            raise ConfigError(f"{module_name} does not exist, so {attribute} cannot be loaded from it")
        module = load_file(Path(module_name))
    else:
        module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ConfigError(f"{module_name} has no {attribute}")
    return getattr(module, attribute)
