"""The base of every configuration section: strict types, one vocabulary, clear errors.

A section is a pydantic model whose attribute docstrings are the help text. Around it this file owns what pydantic does
not do: reading TOML / YAML / JSON, dotted flags, leaf names without their section, aliases, did-you-mean, and where each
value came from. Values given as text (flags, YAML's `3e-4`) are read by TOML's grammar, then validated strictly.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
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
    change: Change = "free",
    spellings: dict[str, Any] | None = None,
    **constraints: Any,
) -> Any:
    """A configuration key: its default, other names for it, other spellings of its values, and how it may change."""
    extra: Any = {"aliases": tuple(aliases), "change": change, "spellings": dict(spellings or {})}
    return Field(default, json_schema_extra=extra, **constraints)


class Settings(BaseModel):
    """Base of every section. Unknown keys are errors, types are strict, docstrings under the keys are their help."""

    model_config = ConfigDict(
        strict=True, extra="forbid", use_attribute_docstrings=True, validate_assignment=True, protected_namespaces=()
    )

    # Words that set other keys: spelled -> function(value) -> {dotted key: value, Fallback or ListChange}.
    translations: ClassVar[dict[str, Callable[[Any], dict[str, Any]]]] = {}
    # Words that leave others beside them without a meaning when they say false (use_amp = false, amp_dtype = bf16).
    switches: ClassVar[dict[str, tuple[str, ...]]] = {}

    @classmethod
    def key_info(cls, name: str) -> dict[str, Any]:
        extra = cls.model_fields[name].json_schema_extra
        base: dict[str, Any] = {"aliases": (), "change": "free", "spellings": {}}
        return {**base, **extra} if isinstance(extra, dict) else base

    @classmethod
    def first_key(cls) -> str:
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
        kept = [item for item in items if item not in self.remove]
        return [*kept, *(item for item in self.add if item not in kept)]


def plain(word: str) -> str:
    """Keys and enumerations are compared in lower case with '_' for '-'."""
    return word.strip().lower().replace("-", "_")


# ---------------------------------------------------------------------------------------------------------------------
# values


def parse_text(text: str) -> Any:
    """A value typed by a user, by TOML's grammar (`3e-4`, `true`, `[1, 2]`, `"x"`); anything else is a string."""
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
    kind: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation  # type: ignore[misc]
    return TypeAdapter(kind, config=ConfigDict(strict=True))


def fit_value(section: type[Settings], name: str, value: Any, from_text: bool) -> Any:
    """`value` as key `name` of `section` wants it, or ConfigError saying key, value, and what is allowed."""
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
            return _adapter(section, name).validate_python(candidate)
        except ValidationError as problem:
            first_problem = first_problem or problem
    assert first_problem is not None
    raise ConfigError(_explain(name, value, first_problem, choices))


def _explain(key: str, value: Any, problem: ValidationError, choices: list[str]) -> str:
    details = problem.errors()
    messages = []
    for detail in details:
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ").strip()
        if message not in messages:
            messages.append(message)
    text = "; or ".join(messages[:3])
    if choices and isinstance(value, str):
        text = f"{nearest(plain(value), choices)} (allowed: {', '.join(choices)})"
    return f"{key} = {value!r}: {text}"


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


@dataclass
class Vocabulary:
    """Every section with its keys and aliases, and the rules that map what users write onto them."""

    sections: dict[str, type[Settings]]
    section_aliases: dict[str, str] = field(default_factory=dict)
    open_sections: frozenset[str] = frozenset()  # sections whose keys are known only later (model)
    notes: list[str] = field(default_factory=list)

    def names_of(self, section: str) -> dict[str, str]:
        """Every accepted name inside a section -> its key; translated words map to themselves."""
        if section not in self.sections:
            return {}
        cls = self.sections[section]
        names = {key: key for key in cls.model_fields}
        for key in cls.model_fields:
            for alias in cls.key_info(key)["aliases"]:
                names[alias] = key
        names.update({word: word for word in cls.translations})
        return names

    def all_names(self) -> list[str]:
        return [n for s in self.sections for n in (*self.names_of(s), *(f"{s}.{k}" for k in self.names_of(s)))]

    def flatten(self, table: dict[str, Any], origin: str, from_text: bool = False) -> list[Given]:
        """A nested or dotted table as a list of canonical values; ConfigError for unknown or ambiguous keys."""
        found: list[Given] = []
        for written, value in self._meant(table, origin).items():
            head, *rest = str(written).split(".")
            section = self._section(head)
            if section and rest:
                found += self._within(section, ".".join(rest), value, origin, from_text)
            elif section and isinstance(value, dict):
                for inner, inner_value in value.items():
                    found += self._within(section, str(inner), inner_value, origin, from_text)
            elif section:
                found += self._section_as_word(section, head, value, origin, from_text)
            elif rest:
                raise ConfigError(
                    f"{origin}: unknown section {head!r} in {written!r}: "
                    f"{nearest(plain(head), [*self.sections, *self.open_sections])}"
                )
            else:
                found += self._leaf(head, value, origin, from_text)
        return found

    def _meant(self, table: dict[str, Any], origin: str) -> dict[str, Any]:
        """The table without what a switch beside it, set to false, leaves without a meaning."""
        leaves = {plain(str(k).rpartition(".")[2]): v for k, v in table.items() if not isinstance(v, dict)}
        for inner in table.values():
            leaves.update({plain(str(k)): v for k, v in inner.items()} if isinstance(inner, dict) else {})
        idle = {
            word: switch for cls in self.sections.values() for switch, words in cls.switches.items() for word in words
            if plain(str(leaves.get(switch))) == "false"
        }  # fmt: skip

        def kept(items: dict[str, Any]) -> dict[str, Any]:
            out = {}
            for key, value in items.items():
                word = plain(str(key).rpartition(".")[2])
                if word in idle and word in leaves:
                    self.notes.append(f"{origin}: {word} = {value!r} means nothing beside {idle[word]} = false")
                else:
                    out[key] = kept(value) if isinstance(value, dict) else value
            return out

        return kept(table) if idle else table

    def _section_as_word(self, section: str, word: str, value: Any, origin: str, from_text: bool) -> list[Given]:
        """A section's name (or a word for it) with one value: `optimizer = muon`, `early_stopping = true`."""
        name = plain(word)
        if name not in self.names_of(section):
            name = self.sections[section].first_key() if section in self.sections else "arch"
        return self._within(section, name, value, origin, from_text)

    def _section(self, word: str) -> str | None:
        word = plain(word)
        word = self.section_aliases.get(word, word)
        return word if word in self.sections or word in self.open_sections else None

    def _within(self, section: str, name: str, value: Any, origin: str, from_text: bool) -> list[Given]:
        known = self.names_of(section)
        if plain(name) in known:
            return self.given(section, plain(name), value, origin, from_text)
        if section in self.open_sections:
            return [Given(f"{section}.{plain(name)}", value, f"{origin}: {section}.{name}", from_text)]
        elsewhere = self.elsewhere(plain(name))
        if elsewhere is not None:
            self.notes.append(f"{origin}: {section}.{name} belongs to [{elsewhere}] and was read as such")
            return self.given(elsewhere, plain(name), value, origin, from_text)
        inner = self._section(name)
        if inner is not None:  # training.optimizer, data.tokenizer
            if not isinstance(value, dict):
                return self._section_as_word(inner, name, value, origin, from_text)
            return [g for k, v in value.items() for g in self._within(inner, str(k), v, origin, from_text)]
        raise ConfigError(f"{origin}: {self.unknown(f'{section}.{name}', list(known))}")

    def unknown(self, word: str, known: list[str] | None = None, arch: str | None = None) -> str:
        """What is said of a key that nobody knows: three near ones at most, and where all of them are."""
        name = plain(word).rpartition(".")[2]
        names = known if known is not None else [n for s in self.sections for n in self.names_of(s)]
        listed = "treadle train --help all" if arch is None else f"treadle train --model.arch {arch} --help"
        return f"unknown key {word}: {nearest(name, names, listed=listed)}"

    def elsewhere(self, name: str) -> str | None:
        """The one core section that knows a name, if only one does."""
        homes = [home for home in self._sections_with(name) if home not in self.open_sections]
        return homes[0] if len(homes) == 1 else None

    def _sections_with(self, name: str) -> list[str]:
        # A key's own name wins over an alias of the same spelling elsewhere.
        own = [s for s, cls in self.sections.items() if name in cls.model_fields]
        return own or [s for s in self.sections if name in self.names_of(s)]

    def _leaf(self, name: str, value: Any, origin: str, from_text: bool) -> list[Given]:
        name = plain(name)
        homes = self._sections_with(name)
        if len(homes) == 1:
            return self.given(homes[0], name, value, origin, from_text)
        if len(homes) > 1:
            options = " or ".join(f"{home}.{self.names_of(home)[name]}" for home in homes)
            raise ConfigError(f"{origin}: {name!r} is ambiguous; write {options}")
        # An unknown leaf may belong to an open section; who knows its keys decides (recipe.py).
        return [Given(f"?.{name}", value, f"{origin}: {name}", from_text)]

    def given(self, section: str, word: str, value: Any, origin: str, from_text: bool) -> list[Given]:
        cls = self.sections[section]
        if word in cls.translations:
            if from_text:
                value = parse_text(value) if isinstance(value, str) else value
            try:
                translated = cls.translations[word](value)
            except (TypeError, ValueError, KeyError, AttributeError):
                raise ConfigError(f"{origin}: {word} = {value!r} is not understood") from None
            given = []
            for dotted, found in translated.items():
                one = self._checked(dotted, found.value if isinstance(found, Fallback) else found, f"{origin}: {word}", False)
                one.fallback = isinstance(found, Fallback)
                given.append(one)
            self.notes += [f"{origin}: {word} is read as {g.key} = {g.value!r}" for g in given
                           if not isinstance(g.value, ListChange) and g.key.partition(".")[2] != word]  # fmt: skip
            return given
        key = self.names_of(section)[word]
        if key != word:
            self.notes.append(f"{origin}: {word} is read as {section}.{key}")
        return [self._checked(f"{section}.{key}", value, f"{origin}: {word}" if key != word else origin, from_text)]

    def _checked(self, dotted: str, value: Any, origin: str, from_text: bool) -> Given:
        section, _, key = dotted.partition(".")
        if isinstance(value, ListChange) or (section in self.open_sections and section not in self.sections):
            return Given(dotted, value, origin, from_text)
        try:
            fitted = fit_value(self.sections[section], key, value, from_text)
        except ConfigError as problem:
            raise ConfigError(f"{origin}: {section}.{problem}") from None
        return Given(dotted, fitted, origin, False)


def merge(given: list[Given]) -> dict[str, Given]:
    """One layer of values by key; the same key given twice with different values (alias and name) is an error. Switches
    that change a list add up, in any order, and change an explicit list beside them."""
    merged: dict[str, Given] = {}
    for one in given:
        before = merged.get(one.key)
        merged[one.key] = one if before is None else _both(before, one)
    return merged


def _both(before: Given, one: Given) -> Given:
    if before.fallback != one.fallback:
        return before if one.fallback else one
    values = before.value, one.value
    changes = [value for value in values if isinstance(value, ListChange)]
    listed = next((value for value in values if isinstance(value, list)), [])
    added = {*listed, *(item for change in changes for item in change.add)} if changes else set()
    if changes and not any(added & set(change.remove) for change in changes):
        if len(changes) == 1:
            return Given(one.key, changes[0].applied(listed), one.origin, False)
        first, second = changes
        added_by = tuple(second.applied(list(first.add)))
        return Given(one.key, ListChange(added_by, first.remove + second.remove), one.origin, False)
    if before.value != one.value:
        raise ConfigError(
            f"{one.key} is given twice with different values: {before.value!r} ({before.origin}) "
            f"and {one.value!r} ({one.origin}); keep one"
        )
    return one


def settle(section: type[Settings], one: Given, below: Given | None) -> Any:
    """A layer's value over the one below it (or the key's default), which a switch changes instead of replacing."""
    if not isinstance(one.value, ListChange):
        return one.value
    name = one.key.partition(".")[2]
    items = below.value if below is not None else section.model_fields[name].get_default(call_default_factory=True)
    return one.value.applied(items)


def parse_flags(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """['x', '--a.b', '1', '--c=2', '--flag'] -> (['x'], {'a.b': '1', 'c': '2', 'flag': 'true'})."""
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
                value = "true"  # bare booleans work
            else:
                value = following
                index += 1
        if name in flags and flags[name] != value:
            raise ConfigError(f"--{name} is given twice: {flags[name]!r} and {value!r}; keep one")
        flags[name] = value
    return words, flags


def build_section(section: str, cls: type[Settings], values: dict[str, Given]) -> Settings:
    """The section's object from its values; a rule that spans keys names the section and the values involved."""
    try:
        return cls(**{given.key.partition(".")[2]: given.value for given in values.values()})
    except ValidationError as problem:
        detail = problem.errors()[0]
        place = ".".join([section, *(str(part) for part in detail["loc"][:1])])
        message = detail["msg"].removeprefix("Value error, ")
        origin = values[place].origin if place in values else ""
        raise ConfigError(f"{place}: {message}" + (f" (from {origin})" if origin else "")) from None


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
