"""The base of every configuration section: strict types, one vocabulary, clear errors.

A section is a pydantic model whose attribute docstrings are the help text. Around it this file owns what pydantic does
not do: reading TOML / YAML / JSON, dotted flags, spellings of values, and where each value came from (which key a word
means: naming.py). Values given as text (flags, YAML's `3e-4`) are read by TOML's grammar, then validated strictly.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import json
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from treadle.errors import ConfigError
from treadle.registry import nearest

# How a key may change when a run continues: `free` any time, `guarded` with --allow-change KEY, `fixed` never.
Change = Literal["free", "guarded", "fixed"]


def option(
    default: Any = ...,
    *,
    aliases: Iterable[str] = (),
    change: Change | None = None,
    spellings: dict[str, Any] | None = None,
    **constraints: Any,
) -> Any:
    """A configuration key: its default, other names for it, other spellings of its values, and how it may change when a run
    goes on (where nothing is said: freely in a core section, not at all in a model or a task)."""
    extra: Any = {"aliases": tuple(aliases), "change": change, "spellings": dict(spellings or {})}
    return Field(default, json_schema_extra=extra, **constraints)


@functools.cache
def _documented(cls: type) -> dict[str, str]:
    """Key -> the docstring under it, of the class itself; nothing where its source is not at hand."""
    if cls.__module__.startswith(("builtins", "pydantic")):
        return {}
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    statements = body.body if isinstance(body, ast.ClassDef) else []
    return {
        key.target.id: inspect.cleandoc(words.value.value)
        for key, words in itertools.pairwise(statements)
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(words, ast.Expr)
        and isinstance(words.value, ast.Constant) and isinstance(words.value.value, str)
    }  # fmt: skip


class Settings(BaseModel):
    """Base of every section. Unknown keys are errors, types are strict, docstrings under the keys are their help."""

    model_config = ConfigDict(
        strict=True, extra="forbid", validate_assignment=True, protected_namespaces=(),
        defer_build=True,  # help reads keys alone: no validator is built for it (a third of the time of --help)
    )  # fmt: skip

    # Words that set other keys: spelled -> function(value) -> {dotted key: value, Fallback or ListChange}.
    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {}
    # Words that leave others beside them without a meaning when they say false (use_amp = false, amp_dtype = bf16).
    switches: ClassVar[dict[str, tuple[str, ...]]] = {}
    # The section's name in messages, where it is not the class's name without "Settings".
    called: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        """ConfigError for keys that there are not and values that do not fit, naming the nearest key."""
        values = {key: str(value) if isinstance(value, PurePath) else value for key, value in values.items()}
        try:
            super().__init__(**values)
        except ValidationError as problem:
            raise _refusal(type(self), values, problem) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as problem:
            raise _refusal(type(self), {name: value}, problem) from None

    @classmethod
    def section_name(cls) -> str:
        """What the section is called in files and flags."""
        return cls.called or cls.__name__.removesuffix("Settings").lower()

    @classmethod
    def key_info(cls, name: str) -> dict[str, Any]:
        """What `option(...)` says of a key: aliases, how it may change, spellings."""
        extra = cls.model_fields[name].json_schema_extra
        base: dict[str, Any] = {"aliases": (), "change": None, "spellings": {}}
        return {**base, **extra} if isinstance(extra, dict) else base

    @classmethod
    def meaning(cls, name: str) -> str:
        """What the docstring under a key says, in the class that declares it. Read when help is shown: for all sections together
        their sources take .15 s, which a start need not pay."""
        if given := cls.model_fields[name].description:
            return given
        return next((_documented(base)[name] for base in cls.__mro__ if name in _documented(base)), "")

    @classmethod
    def first_key(cls) -> str:
        """The key that a bare value of the section means."""
        return next(iter(cls.model_fields))


@dataclass(frozen=True)
class Fallback:
    """What a translation sets unless the same table says it by its own name."""

    value: Any


@dataclass(frozen=True)
class ListChange:
    """What a switch adds to a list key or takes away from it, whatever the list holds."""

    add: tuple[Any, ...] = ()
    remove: tuple[Any, ...] = ()

    def applied(self, items: list[Any]) -> list[Any]:
        """The list after the change; what is there already is not added again."""
        kept = [item for item in items if item not in self.remove]
        return [*kept, *(item for item in self.add if item not in kept)]
class Refused(ConfigError):
    """A key or value that a section does not take; `key` is None where a rule spans several."""

    def __init__(self, section: str, key: str | None, value: Any, reason: str) -> None:
        self.key, self.value, self.reason = key, value, reason
        super().__init__(self.said_of(section))
        self.section = section

    def __reduce__(self) -> Any:  # from a worker process to its parent
        return Refused, (self.section, self.key, self.value, self.reason)

    def said_of(self, section: str) -> str:
        """The refusal as a sentence about a key of this section."""
        return f"{section}: {self.reason}" if self.key is None else f"{section}.{self.key} = {shown(self.value)}: {self.reason}"


def _refusal(cls: type[Settings], values: dict[str, Any], problem: ValidationError) -> Refused:
    details = problem.errors()
    key = str(details[0]["loc"][0]) if details[0]["loc"] else None
    if key is None or key not in values:
        return Refused(cls.section_name(), None, None, _reasons(details))
    if key not in cls.model_fields:
        return Refused(cls.section_name(), key, values[key], _no_such_key(cls, key))
    reason = _reason(values[key], [d for d in details if d["loc"][:1] == (key,)], _allowed(cls, key))
    return Refused(cls.section_name(), key, values[key], reason)


def _no_such_key(cls: type[Settings], name: str) -> str:
    """What to write instead of a key that the section has not; other words for a key lead to its name."""
    names = {word: key for key in cls.model_fields for word in (key, *cls.key_info(key)["aliases"])}
    if plain(name) in names:
        return f"unknown key; it is called {names[plain(name)]!r} here"
    place = "--model.arch NAME --help model" if cls.section_name() == "model" else f"--help {cls.section_name()}"
    otherwise = f"none is like it; treadle train {place} lists them"
    return f"unknown key: {nearest(plain(name), list(names), meant=names, otherwise=otherwise)}"


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def plain(word: str) -> str:
    """Keys and enumerations are compared in lower case with '_' for '-'."""
    return word.strip().lower().replace("-", "_")


# ---------------------------------------------------------------------------------------------------------------------
# values


_NUMBERS = re.compile(r"\[[\[\]\d.,\s+\-eE]*\]|[+-]?\.\d+([eE][+-]?\d+)?")  # lists of numbers, and one like .5
_LEADING_POINT = re.compile(r"(?<![\d.])\.(?=\d)")


def parse_text(text: str) -> Any:
    """A value typed by a user, by TOML's grammar (`3e-4`, `true`, `[1, 2]`, `"x"`), and `.5` with its lists; anything else is a string."""
    if _NUMBERS.fullmatch(text):
        text = _LEADING_POINT.sub("0.", text)
    if text.strip().lower() in ("true", "false"):  # True and False, as Python's users type them
        return text.strip().lower() == "true"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, ValueError):
        return text


def _enumeration(section: type[Settings], name: str) -> list[str]:
    """The string choices of a Literal key (also inside Optional, Union or list), else []."""
    found: list[str] = []

    def walk(annotation: Any) -> None:
        if typing.get_origin(annotation) is Literal:
            found.extend(choice for choice in typing.get_args(annotation) if isinstance(choice, str))
        else:
            for argument in typing.get_args(annotation):
                walk(argument)

    walk(section.model_fields[name].annotation)
    return found


def _allowed(section: type[Settings], name: str) -> list[str]:
    """What a message lists: the choices, with true and false where the key is a switch (too)."""
    annotation, choices = section.model_fields[name].annotation, _enumeration(section, name)
    switch = annotation is bool or (choices and bool in typing.get_args(annotation))
    return [*choices, "true", "false"] if switch else choices


def _accepts_none(section: type[Settings], name: str) -> bool:
    annotation = section.model_fields[name].annotation
    return type(None) in typing.get_args(annotation) or annotation is type(None)


def _accepts_list(section: type[Settings], name: str) -> bool:
    annotation = section.model_fields[name].annotation
    return any(typing.get_origin(a) is list for a in (annotation, *typing.get_args(annotation)))


@functools.cache
def _adapter(section: type[Settings], name: str) -> TypeAdapter[Any]:
    """Validates one key alone; rules that span keys wait until the whole section is built."""
    info = section.model_fields[name]
    kind: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    return TypeAdapter(kind, config=ConfigDict(strict=True))


def fit_value(section: type[Settings], name: str, value: Any, from_text: bool) -> Any:
    """`value` as key `name` of `section` wants it, or ConfigError saying key, value, and what is allowed."""
    if isinstance(value, PurePath):
        value = str(value)
    info = section.key_info(name)
    choices = _enumeration(section, name)

    def respell(item: Any) -> Any:
        if isinstance(item, (str, bool)) or item is None:  # YAML reads `no` as false
            word = plain(str(item))
            if word in info["spellings"]:
                return info["spellings"][word]
            if word in choices:
                return word
        return item

    candidates: list[Any] = []
    if isinstance(value, str):
        parsed = parse_text(value)
        candidates = [parsed, value] if from_text else [value, parsed]
        if _accepts_list(section, name) and "," in value:
            candidates.append([parse_text(part.strip()) for part in value.split(",") if part.strip()])
            candidates.append([part.strip() for part in value.split(",") if part.strip()])
        if _accepts_list(section, name):
            candidates += [[value], [parsed]]
        if plain(value) in ("none", "null") and _accepts_none(section, name):
            candidates.insert(0, None)
    else:
        candidates = [value]
    candidates = [[respell(item) for item in c] if isinstance(c, list) else respell(c) for c in candidates]
    first_problem: ValidationError | None = None
    for candidate in candidates:
        try:
            fitted = _adapter(section, name).validate_python(candidate)
        except ValidationError as problem:
            first_problem = first_problem or problem
            continue
        if isinstance(value, Bare) and fitted in ("true", ["true"]):  # a text that nobody typed
            raise Forgotten.of(value)
        return fitted
    if isinstance(value, Bare):
        raise Forgotten.of(value)
    assert first_problem is not None
    raise ConfigError(f"{name} = {value!r}: {_reason(value, first_problem.errors(), _allowed(section, name))}")


def _reason(value: Any, details: Sequence[Any], choices: list[str]) -> str:
    if choices and isinstance(value, str):
        near = nearest(plain(value), choices)
        return (f"{near} " if "did you mean" in near else "") + f"(allowed: {', '.join(choices)})"
    return _reasons(details)


def _reasons(details: Sequence[Any]) -> str:
    messages = [detail["msg"].removeprefix("Value error, ").removeprefix("Input ").strip() for detail in details]
    return "; or ".join(list(dict.fromkeys(messages))[:3])


# ---------------------------------------------------------------------------------------------------------------------
# files


def load_table(path: str | Path) -> dict[str, Any]:
    """A TOML, YAML or JSON file as a table. Raises ConfigError naming the file and the place of a syntax error."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; `treadle recipes` lists the built-in ones") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path} cannot be read: {problem}") from None
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            table = yaml.safe_load(text)
        elif path.suffix == ".json":
            table = json.loads(text)
        else:
            table = tomllib.loads(text)
    except Exception as problem:  # each parser has its own error class; all mean the same to the user
        raise ConfigError(f"{path} is not valid {path.suffix.lstrip('.') or 'TOML'}: {problem}") from None
    if table is None:
        table = {}
    if isinstance(table, list) and path.suffix == ".json":
        raise ConfigError(f"{path} holds a list; rows to train on are read from a .jsonl file, one a line: "
                          f"jq -c '.[]' {path} > {path.stem}.jsonl")  # fmt: skip
    if not isinstance(table, dict):
        raise ConfigError(f"{path} must hold a table of sections, not a {type(table).__name__}")
    return table


def dump_toml(tables: dict[str, dict[str, Any]]) -> str:
    """Sections of scalars, lists and one-level tables as TOML; None means 'leave out' (its default is None)."""
    lines: list[str] = []
    for section, table in tables.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        return text if any(c in text for c in ".ein") else text + ".0"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    raise ConfigError(f"cannot write {value!r} to a TOML file")


# ---------------------------------------------------------------------------------------------------------------------
# names


@dataclass
class Given:
    """One value that somebody gave: where it belongs, what it is, and how it was spelled where."""

    key: str  # dotted, canonical
    value: Any  # a ListChange where a switch adds to a list
    origin: str  # "flag --lr", "recipe.toml: training.lr"
    from_text: bool
    fallback: bool = False  # gives way to the same key in the same layer


class Bare(str):
    """The "true" of a flag that stands without a value, which switches alone take."""

    flag: str

    @staticmethod
    def of(flag: str) -> Bare:
        """The value of this flag, named without its dashes."""
        value = Bare("true")
        value.flag = flag
        return value


class Forgotten(ConfigError):
    """A flag whose value was not typed."""

    @staticmethod
    def of(value: Bare) -> Forgotten:
        """The error that names the flag."""
        return Forgotten(f"--{value.flag} needs a value")


def parse_flags(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """['x', '--a.b', '1', '--c=2', '--flag'] -> (['x'], {'a.b': '1', 'c': '2', 'flag': 'true'}). ConfigError for a flag
    given twice."""
    words: list[str] = []
    flags: dict[str, str] = {}
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        index += 1
        if not re.match(r"^--[A-Za-z]", argument):
            words.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals:
            following = arguments[index] if index < len(arguments) else None
            if following is None or re.match(r"^--[A-Za-z]", following):
                value = Bare.of(name)  # bare booleans work
            else:
                value = following
                index += 1
        if name in flags and flags[name] != value:
            raise ConfigError(f"--{name} is given twice: {flags[name]!r} and {value!r}; keep one")
        flags[name] = value
    return words, flags


def build_section(section: str, cls: type[Settings], values: dict[str, Given]) -> Settings:
    """The section's object from its values; a rule that spans keys names the section and the values involved.
    ConfigError says which rule is broken."""
    try:
        return cls(**{given.key.partition(".")[2]: given.value for given in values.values()})
    except Refused as problem:
        place = f"{section}.{problem.key}"
        origin = values[place].origin if place in values else ""
        said = f" (from {origin})" if origin not in ("", "arguments") else ""
        raise ConfigError(problem.said_of(section) + said) from None


def describe_type(annotation: Any) -> str:
    """A short, human form of a key's type for help and docs/options."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(describe_type(a) for a in typing.get_args(annotation) if a is not type(None))
    if origin in (list, tuple):
        return "list of " + describe_type(typing.get_args(annotation)[0])
    if origin is dict:
        return "table"
    return getattr(annotation, "__name__", str(annotation))
