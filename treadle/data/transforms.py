"""What is done to documents between reading and encoding: maps, filters, limits of length.

A transform takes the documents of one piece and gives others, in order. Its fingerprint is part of the run: the source of its
function with the values in its closure and its defaults (what it reads from globals, or calls elsewhere, is not in it), or a
`version` that the user keeps. A comment that changes is a change.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from treadle import trusted_code
from treadle.data.documents import Bad
from treadle.errors import ConfigError

Texts = Iterator[str | Bad]
Malformed = Callable[[int, str], Bad]  # (ordinal of a document in the piece, what is wrong with it) -> its record


class Unhashable(Exception):
    """A value that nothing stable stands for."""


def function_fingerprint(function: Any) -> str | None:
    """A hash of what a function does, as far as it can be seen; None where its source cannot be had."""
    try:
        return hashlib.sha256(json.dumps(_described(function)).encode()).hexdigest()[:32]
    except (Unhashable, ValueError, RecursionError):
        return None


def _described(value: Any) -> Any:
    """A JSON value that stands for a plain value or a function."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return ["list", *map(_described, value)]
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted(json.dumps(_described(one)) for one in value)]
    if isinstance(value, dict):
        return ["table", *([_described(key), _described(one)] for key, one in value.items())]
    if isinstance(value, re.Pattern):
        return ["pattern", _described(value.pattern), value.flags]
    if not inspect.isfunction(value):
        raise Unhashable
    try:
        source = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError, IndentationError):  # typed in an interpreter, built in, or written in C
        raise Unhashable from None
    if value.__name__ == "<lambda>" and len(re.findall(r"\blambda\b", source)) != 1:
        raise Unhashable  # the line holds several, and nothing says which this is
    try:
        closure = [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError:  # an empty cell
        raise Unhashable from None
    return ["function", source, _described(closure), _described(value.__defaults__), _described(value.__kwdefaults__)]


def function_label(function: Any) -> str:
    """What people call a function: FILE.py:NAME."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__name__).rpartition("<locals>.")[2]
    return f"{Path(code.co_filename).name}:{name}" if code is not None else name


class Transform(ABC):
    """Base of every transform."""

    @abstractmethod
    def apply(self, texts: Texts, malformed: Malformed) -> Texts:
        """The documents of one piece; malformed ones are passed on in their place."""

    @abstractmethod
    def fingerprint(self) -> str | None:
        """Equal for transforms that do the same; None where nobody can tell."""

    def label(self) -> str:
        """What people call it."""
        return type(self).__name__


class FunctionTransform(Transform):
    """Base of those that call a function of the user's."""

    def __init__(self, function: Callable[..., Any], version: str | int | None = None) -> None:
        if not callable(function):
            raise ConfigError(f"{type(self).__name__}({function!r}): give a function")
        self.function, self.version = function, version
        self._source = function_fingerprint(function) if version is None else None  # now, before anybody edits the file

    def fingerprint(self) -> str | None:
        if self.version is not None:
            return f"{type(self).__name__}:{self.label()}:version {self.version}"
        return None if self._source is None else f"{type(self).__name__}:{self._source}"

    def label(self) -> str:
        return function_label(self.function)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process that was not forked. A function of FILE.py travels by its name, since no import finds it there."""
        state = dict(self.__dict__)
        if (place := trusted_code.place_of(self.function)) is not None:
            state["function"] = place
        elif getattr(self.function, "__module__", "__main__") == "__main__":
            raise TypeError(f"{self.label()} is part of the program itself, which a worker would run once more to find it")
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["function"], str):
            state["function"] = trusted_code.load(state["function"], "transform")
        self.__dict__.update(state)


class Map(FunctionTransform):
    """function(text) -> text, of every document. To leave a document out, use Filter."""

    def apply(self, texts: Texts, malformed: Malformed) -> Texts:
        for ordinal, text in enumerate(texts):
            yield text if isinstance(text, Bad) else self._one(text, ordinal, malformed)

    def _one(self, text: str, ordinal: int, malformed: Malformed) -> str | Bad:
        try:
            made = self.function(text)
        except Exception as problem:  # whatever a user's function raises
            return malformed(ordinal, _raised(self.label(), problem))
        return made if (wrong := _not_text(made)) is None else malformed(ordinal, f"{self.label()} returned {wrong}")


class Filter(FunctionTransform):
    """Keeps the documents for which function(text) is true."""

    def apply(self, texts: Texts, malformed: Malformed) -> Texts:
        for ordinal, text in enumerate(texts):
            if isinstance(text, Bad):
                yield text
                continue
            try:
                kept = bool(self.function(text))
            except Exception as problem:
                yield malformed(ordinal, _raised(self.label(), problem))
                continue
            if kept:
                yield text


class BatchedMap(FunctionTransform):
    """function(list of texts) -> list of texts, of up to batch_size neighbours at once (never over the end of a piece); it may
    give more or fewer. Where it raises, each document of the batch is malformed."""

    def __init__(self, function: Callable[[list[str]], list[str]], batch_size: int = 100, version: str | int | None = None) -> None:
        super().__init__(function, version)
        if batch_size < 1:
            raise ConfigError(f"BatchedMap(batch_size={batch_size}): give 1 or more")
        self.batch_size = batch_size

    def fingerprint(self) -> str | None:
        found = super().fingerprint()
        return None if found is None else f"{found}:{self.batch_size}"

    def apply(self, texts: Texts, malformed: Malformed) -> Texts:
        numbered = enumerate(texts)
        while batch := list(islice(numbered, self.batch_size)):
            good = [(ordinal, text) for ordinal, text in batch if not isinstance(text, Bad)]
            yield from (text for _, text in batch if isinstance(text, Bad))
            if not good:
                continue
            try:
                made = self.function([text for _, text in good])
                wrong = next((w for w in map(_not_text, made) if w is not None), None) if isinstance(made, list) else type(made).__name__
                reason = None if wrong is None else f"{self.label()} returned {wrong}; wanted is a list of texts"
            except Exception as problem:
                reason = _raised(self.label(), problem)
            if reason is None:
                yield from made
            else:
                yield from (malformed(ordinal, reason) for ordinal, _ in good)


def _raised(label: str, problem: Exception) -> str:
    return f"{label} raised {type(problem).__name__}: {problem}"


def _not_text(made: Any) -> str | None:
    """What a function has returned in place of text."""
    if not isinstance(made, str):
        return type(made).__name__
    if "\x00" in made:
        return "a NUL character"
    try:
        made.encode("utf-8")
    except UnicodeEncodeError:
        return "an unpaired surrogate, which UTF-8 cannot hold"
    return None


class MinimumLength(Transform):
    """Leaves out documents of fewer characters."""

    def __init__(self, characters: int) -> None:
        self.characters = characters

    def fingerprint(self) -> str:
        return f"MinimumLength:{self.characters}"

    def apply(self, texts: Texts, malformed: Malformed) -> Texts:
        return (text for text in texts if isinstance(text, Bad) or len(text) >= self.characters)


class MaximumLength(Transform):
    """Leaves out documents of more characters; with cut=True, keeps the first of theirs."""

    def __init__(self, characters: int, cut: bool = False) -> None:
        self.characters, self.cut = characters, cut

    def fingerprint(self) -> str:
        return f"MaximumLength:{self.characters}:{self.cut}"

    def apply(self, texts: Texts, malformed: Malformed) -> Texts:
        for text in texts:
            if isinstance(text, Bad) or len(text) <= self.characters:
                yield text
            elif self.cut:
                yield text[: self.characters]
