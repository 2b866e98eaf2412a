"""Which key a word means: leaf names without their section, aliases, words that set other keys, switches that change a list.

A section owns its own words (`aliases` and `translations`); this file owns the rules that map what users write onto keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from treadle.errors import ConfigError
from treadle.foreign import IDLE, idle
from treadle.registry import nearest
from treadle.settings import Fallback, Forgotten, Given, ListChange, Settings, fit_value, parse_text, plain, shown

TYPED = ("flag", "arguments")  # origins of what a user typed, or passed from Python


@dataclass
class Vocabulary:
    """Every section with its keys and aliases, and the rules that map what users write onto them."""

    sections: dict[str, type[Settings]]
    section_aliases: dict[str, str] = field(default_factory=dict)
    open_sections: frozenset[str] = frozenset()  # sections whose keys are known only later (model)
    notes: list[str] = field(default_factory=list)
    other_flags: tuple[str, ...] = ()  # what the verb takes beside keys
    arch: str = ""  # whose keys [model] holds, once it is known

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
                    f"{origin}: {written} = {shown(value)}: unknown section {head!r}: "
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
        known, inner = self.names_of(section), self._section(name)
        if inner is not None and isinstance(value, dict):  # training.optimizer, training.early_stopping
            return [g for k, v in value.items() for g in self._within(inner, str(k), v, origin, from_text)]
        if plain(name) in known:
            return self.given(section, plain(name), value, origin, from_text)
        if section in self.open_sections:
            return [Given(f"{section}.{plain(name)}", value, f"{origin}: {section}.{name}", from_text)]
        elsewhere = self.elsewhere(plain(name))
        if elsewhere is not None and (section, plain(name)) != ("eval", "max_iters"):  # there litgpt counts batches of evaluation
            self.notes.append(f"{origin}: {section}.{name} belongs to [{elsewhere}] and was read as such")
            return self.given(elsewhere, plain(name), value, origin, from_text)
        if inner is not None:
            return self._section_as_word(inner, name, value, origin, from_text)
        near = nearest(plain(name), list(known), otherwise="none is like it")
        raise ConfigError(f"{origin}: {section}.{name} = {shown(value)}: unknown key: {near} (all of them: treadle train --help {section})")

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
        if name in IDLE:
            try:
                self.notes.append(f"{origin}: {idle(name, parse_text(value) if from_text else value)}")
            except ConfigError as problem:
                raise ConfigError(f"{origin}: {problem}") from None
            return []
        # An unknown leaf may belong to an open section; who knows its keys decides (recipe.py).
        return [Given(f"?.{name}", value, f"{origin}: {name}", from_text)]

    def given(self, section: str, word: str, value: Any, origin: str, from_text: bool) -> list[Given]:
        cls = self.sections[section]
        if word in cls.translations:
            if from_text:
                value = parse_text(value) if isinstance(value, str) else value
            try:
                translated = cls.translations[word](value)
            except ConfigError as problem:
                raise ConfigError(f"{origin}: {word} = {value!r}: {problem}") from None
            except (TypeError, ValueError, KeyError, AttributeError):
                raise ConfigError(f"{origin}: {word} = {value!r} is not understood") from None
            given = []
            for dotted, found in translated.items():
                one = self._checked(dotted, found.value if isinstance(found, Fallback) else found, f"{origin}: {word}", False)
                one.fallback = isinstance(found, Fallback)
                given.append(one)
            self.notes += [f"{origin}: {word} is read as {g.key} = {g.value!r}" for g in given
                           if not (isinstance(g.value, ListChange) or g.fallback) and g.key.partition(".")[2] != word]  # fmt: skip
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
        except Forgotten:
            raise
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


def settle(sections: Mapping[str, type[Settings]], one: Given, below: Given | None) -> Any:
    """A layer's value over the one below it (or the key's default), which a switch changes instead of replacing."""
    if not isinstance(one.value, ListChange):
        return one.value
    section, _, name = one.key.partition(".")
    items = below.value if below is not None else sections[section].model_fields[name].get_default(call_default_factory=True)
    return one.value.applied(items)
