"""Name -> class, for everything a user can choose by name.

A registry knows its built-in names as `module:attribute` strings, so listing them imports nothing heavy. Packages add
names through entry points (`treadle.<kind>`), users through `file.py:Class`, which trusted_code.py may refuse.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from treadle import trusted_code
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


@functools.cache
def _installed() -> Any:
    """Entry points of all packages; read once, since a look through them takes 20 ms and a start asks for ten groups."""
    return entry_points()


class Registry:
    """The names of one kind of thing ('model', 'optimizer', ...) and how to import each. `base` is the class, as
    `module:attribute`, that all of them derive from; without one they are functions."""

    def __init__(
        self, kind: str, builtin: dict[str, str], aliases: dict[str, str] | None = None, base: str | None = None
    ) -> None:
        self.kind = kind
        self.base = base
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
            for point in _installed().select(group=f"treadle.{self.kind}"):
                self._places.setdefault(point.name, point.value)
        return sorted({*self._places, *self._objects})

    def place(self, name: str) -> str | None:
        """`module:attribute` of a name; None for an unknown one and for one registered as an object. Imports nothing."""
        return self._places.get(self._plain(name)) if self.names() else None

    def canonical(self, name: str) -> str:
        """The registered spelling of `name` (case and '-' or '_' do not matter); ConfigError when unknown, or when it names
        code that nobody has trusted."""
        if trusted_code.is_place(name):
            if not self._registered(name):
                trusted_code.require(name, self.kind)
            return name
        plain = self._plain(name)
        if plain not in self.names():
            raise ConfigError(f"unknown {self.kind} {name!r}: {nearest(plain, self.names())}")
        return plain

    def _plain(self, name: str) -> str:
        plain = name.lower().replace("-", "_")
        return self._aliases.get(plain, plain)

    def name_of(self, cls: type, known: str = "") -> str:
        """The name by which `get` finds a class again; `known` where that is one, as it was typed."""
        if trusted_code.is_place(known) and self.get(known) is cls:
            return known
        for name in self.names():
            if self._objects.get(name) is cls or self._places.get(name) == f"{cls.__module__}:{cls.__qualname__}":
                return name
        return place_of(cls, self.kind)

    def get(self, name: str) -> Any:
        """The thing called `name`, imported on first use; `file.py:Class` and `package.module:Class` work too."""
        name = self.canonical(name)
        if name in self._objects:
            return self._objects[name]
        if trusted_code.is_place(name) and not self._registered(name):
            return self._checked(name, trusted_code.load(name, self.kind))
        self._objects[name] = self._checked(name, _import(self._places.get(name, name)))
        return self._objects[name]

    def _registered(self, place: str) -> bool:
        """A place that is treadle's own or an entry point's under some name, so that it needs nobody's trust."""
        return place in self._objects or (bool(self.names()) and place in self._places.values())

    def _checked(self, name: str, thing: Any) -> Any:
        """`thing`, or a ConfigError that says what it is and what is wanted."""
        if self.base is None:
            if not callable(thing):
                raise ConfigError(f"{self.kind} {name!r} is {_described(thing)}; wanted is a function or a class")
            return thing
        base = _import(self.base)
        if not (isinstance(thing, type) and issubclass(thing, base)):
            raise ConfigError(f"{self.kind} {name!r} is {_described(thing)}; wanted is a class derived from "
                              f"{self.base.replace(':', '.')}")  # fmt: skip
        declared = [key for key, kind in inspect.get_annotations(base).items() if str(kind).startswith("ClassVar")]
        missing = [key for key in declared if not hasattr(thing, key)]
        missing += sorted(getattr(thing, "__abstractmethods__", ()))
        if missing:
            raise ConfigError(f"{self.kind} {name!r} lacks {', '.join(missing)}, which a class derived from "
                              f"{self.base.replace(':', '.')} has to have")  # fmt: skip
        return thing


def place_of(cls: type, kind: str) -> str:
    """FILE.py:CLASS or package.module:CLASS, by which a Registry finds a class again that somebody passed from Python, and
    who passes a class trusts it."""
    if (place := trusted_code.place_of(cls)) is not None:
        return place
    if not trusted_code.is_place(f"{cls.__module__}:{cls.__qualname__}"):
        return str(getattr(cls, "arch", cls.__name__))  # made inside a function: nothing can find it again
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if cls.__module__ != "__main__":
        place = f"{cls.__module__}:{cls.__qualname__}"
    elif file is None:
        return f"__main__:{cls.__qualname__}"  # typed into an interpreter: nothing can find it again
    else:
        place = f"{Path(file).resolve()}:{cls.__qualname__}"
    trusted_code.allow(place)
    trusted_code.require(place, kind)
    return place


def _described(thing: Any) -> str:
    if isinstance(thing, type):
        own = thing.__module__.startswith(trusted_code.MODULE_PREFIX)  # a name that nobody typed
        return f"the class {thing.__qualname__}" if own else f"the class {thing.__module__}.{thing.__qualname__}"
    return f"a {type(thing).__name__}"


def _import(place: str) -> Any:
    module_name, _, attribute = place.rpartition(":")
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ConfigError(f"{module_name} has no {attribute}")
    return getattr(module, attribute)
