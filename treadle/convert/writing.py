"""A reading as a recipe: every value under its own name, beside it what it was called, and at the top what had no place."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treadle.convert.own import WHY
from treadle.convert.reading import SHARE_WITHOUT_STEPS, Reading, of_steps
from treadle.errors import ConfigError
from treadle.naming import Vocabulary
from treadle.recipe import MODEL_CHOICE, SECTION_ALIASES, Layer, compose, vocabulary
from treadle.settings import dump_toml, plain
from treadle.training.config import SECTIONS, Recipe

NOT_GIVEN = ("recommended for ", "follows from ")  # origins of what a recipe gets anew
# Values that decide which keys there are: each of the others is tried beside them.
CHOOSE_A_MODEL = {word for words in MODEL_CHOICE.values() for word in words} - {"type"}
CHOICES = {*CHOOSE_A_MODEL, "type", "objective", "dataset_class", "dataset_name", "run_name"}
# Data that ships with treadle, by dataset_class: what a recipe is tried with where a file names none.
SHIPPED = {"text": "austen", "conversations": "conversations", "preferences": "preferences"}
Path_ = tuple[str, ...]


def settled(reading: Reading, origin: str, folder: Path | None) -> Recipe:
    """The recipe of a reading. What no key holds moves to `reading.left`, with the reason."""
    try:
        recipe = compose([Layer(reading.table, origin, folder=folder)])
    except ConfigError:
        recipe = _without_the_unknown(reading, origin, folder)
    if recipe.data.path is not None or recipe.data.dataset_name is not None or recipe.data.dataset_class not in SHIPPED:
        return recipe
    word = SHIPPED[recipe.data.dataset_class]
    reading.assumed.append(f"data.path: no text that is here is named; {word}, which ships with treadle, stands in until you name yours")
    return compose([Layer(reading.table, origin, folder=folder), Layer({"data.path": word}, "stand-in")])


def _without_the_unknown(reading: Reading, origin: str, folder: Path | None) -> Recipe:
    every = list(_leaves(reading.table))
    choices = [leaf for leaf in every if _last(leaf[0]) in CHOICES]
    base = compose([Layer(_nested(choices), origin, folder=folder)])  # raises where a choice itself is wrong
    kept = list(choices)
    shares: list[tuple[str, Any]] = []  # of a number of steps that may come later in the file
    for leaf in every:
        if leaf in choices:
            continue
        try:
            compose([Layer(_nested([*choices, leaf]), origin, folder=folder)])
            kept.append(leaf)
        except ConfigError as problem:
            name, reason = ".".join(leaf[0]), str(problem)
            if _last(leaf[0]) == "warmup_ratio" and isinstance(leaf[1], float) and 0 < leaf[1] < 1:
                shares.append((reading.theirs.get(name, name), leaf[1]))
            elif leaf[1] not in (None, False, "", [], {}):  # what is off says nothing that treadle would do
                reading.leave(reading.theirs.get(name, name), leaf[1], WHY.get(_last(leaf[0]), _without_place(reason, origin, base)))
    reading.table = _nested(kept)
    recipe = compose([Layer(reading.table, origin, folder=folder)])
    for theirs, share in shares:
        if recipe.train.max_steps is None:
            reading.leave(theirs, share, SHARE_WITHOUT_STEPS)
        elif recipe.origins.get("optim.warmup_steps", NOT_GIVEN[0]).startswith(NOT_GIVEN):
            kept.append((("optim.warmup_steps",), of_steps(share, recipe.train.max_steps)))
            reading.theirs["optim.warmup_steps"] = f"{theirs} {share:g} of max_steps"
        else:
            reading.leave(theirs, share, "warmup_steps says it already")
    if not shares:
        return recipe
    reading.table = _nested(kept)
    return compose([Layer(reading.table, origin, folder=folder)])


def _last(path: Path_) -> str:
    return plain(path[-1].rpartition(".")[2])


def _leaves(table: dict[str, Any], above: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """(path, value) of every value; a table below a key that is no section is a value."""
    for key, value in table.items():
        section = plain(str(key)) in {*SECTIONS, *SECTION_ALIASES, "model", "task"}
        if isinstance(value, dict) and section and len(above) < 2:
            yield from _leaves(value, (*above, str(key)))
        else:
            yield (*above, str(key)), value


def _nested(leaves: list[tuple[Path_, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for path, value in leaves:
        place = table
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return table


def _without_place(reason: str, origin: str, base: Recipe) -> str:
    """A refusal without the file's name and the key, which stand before it already."""
    said = reason.removeprefix(f"{origin}: ")
    return (said.partition("unknown key: ")[2] and f"no key of treadle ({base.arch})") or said


def text_of(reading: Reading, recipe: Recipe, source: str) -> str:
    """The recipe as TOML with its comments. Composing it again gives `recipe`."""
    lines = [f"# {source}, converted ({reading.kind})."]
    if reading.start is not None:
        lines += _comment(f"It starts from {reading.start}: treadle train THIS.toml --from FOLDER, with that model's folder.")
    if reading.missing:
        lines += ["#", "# To be set before it is trained:", *_bullets(reading.missing)]
    if reading.left:
        lines += ["#", "# Without an equivalent here:", *_bullets(reading.left)]
    if reading.assumed:
        lines += ["#", "# Assumed:", *_bullets(reading.assumed)]
    tables: dict[str, dict[str, Any]] = {"model": {"arch": recipe.arch, "preset": recipe.preset}}
    if reading.start is not None and not CHOOSE_A_MODEL & {_last(path) for path, _ in _leaves(reading.table)}:
        tables = {}  # the model of --from says its own
    values = recipe.tables()
    for key, origin in recipe.origins.items():
        section, _, name = key.partition(".")
        if not origin.startswith(NOT_GIVEN):
            value = values.get(section, {}).get(name)
            tables.setdefault(section, {})[name] = value
    words = vocabulary()
    for section in ("run", "model", "task", *(name for name in SECTIONS if name != "run")):
        table = {name: value for name, value in tables.get(section, {}).items() if value is not None}
        if table:
            lines += ["", f"[{section}]"]
            lines += [_line(section, name, value, reading, recipe.origins, words) for name, value in table.items()]
            lines += [f"# {line}" for line in reading.blanks.get(section, [])]
    return "\n".join(lines) + "\n"


def _line(section: str, name: str, value: Any, reading: Reading, origins: dict[str, str], words: Vocabulary) -> str:
    written = dump_toml({section: {name: value}}).splitlines()[1]
    key = f"{section}.{name}"
    word = origins.get(key, "").partition(": ")[2].rpartition(".")[2]
    theirs = reading.theirs.get(key) or reading.theirs.get(word or name) or word
    return written if theirs in ("", name, key, value) else f"{written}  # {' '.join(theirs.split())}"


def _comment(text: str, first: str = "# ", rest: str = "# ") -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 110, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)


def _bullets(items: list[str]) -> list[str]:
    return [line for item in items for line in _comment(item, "#   ", "#     ")]
