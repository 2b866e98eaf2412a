"""The whole configuration tree: every room's section, composed from defaults, presets, recipes and flags.

Precedence, weakest first: a section's defaults < the model's recommended values for a preset < a continued run's own
config.toml < the recipe < flags. The model section stays a raw table until its architecture is known, so this file
imports no torch unless a model key has to be understood.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle import trusted_code
from treadle.data.settings import TEXT
from treadle.data.sources import BUNDLED
from treadle.data.sources import SUFFIXES as DATA_SUFFIXES
from treadle.errors import ConfigError
from treadle.models.catalogue import MODELS
from treadle.objectives.settings import DEFAULT_OBJECTIVE
from treadle.registry import nearest
from treadle.settings import Given, Settings, Vocabulary, build_section, fit_value, load_table, merge, plain
from treadle.training.config import DEFAULT_ARCHITECTURE, SECTIONS, Recipe

RECIPE_SUFFIXES = (".toml", ".yaml", ".yml", ".json")
DEFAULT_RECIPE = "austen"
# Keys of the model section that choose a model rather than describe it; they have no place in a model's own Config.
MODEL_CHOICE = {"arch": ("arch", "type", "architecture", "model_type"), "preset": ("preset", "model_size"),
                "config_file": ("config_file",)}  # fmt: skip


SECTION_ALIASES = {
    "training": "train",
    "output": "run",
    "experiment": "run",
    "optimizer": "optim",
    "optimiser": "optim",
    "evaluation": "eval",
    "early_stopping": "eval",
    "logging": "log",
    "dataset": "data",
    "checkpointing": "checkpoint",
}


def vocabulary() -> Vocabulary:
    """Every core section and its words; `model` is open until an architecture is chosen, `task` until a dataset and an
    objective are."""
    return Vocabulary(dict(SECTIONS), dict(SECTION_ALIASES), frozenset({"model", "task"}))


@dataclass
class Layer:
    """One source of values, weakest first in a list of layers."""

    table: dict[str, Any]
    origin: str
    from_text: bool = False
    weak: bool = False  # a stored run's values: an explicit "auto" above does not override them


def recipe_folder() -> Path:
    """Where the built-in recipes are: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def builtin_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(recipe_folder().glob("*.toml"))}


def target_layer(target: str | None) -> Layer:
    """What a user named to train on (nothing, a built-in recipe, a recipe file, a task file, text, a folder) as a layer."""
    builtin = builtin_recipes()
    if target is None:
        target = DEFAULT_RECIPE
    path = Path(target)
    if not path.exists() and target in builtin:
        path = builtin[target]
    if path.is_dir() and (path / "config.toml").is_file():
        table = load_table(path / "config.toml")
        trusted_code.recall(table)
        table.setdefault("run", {})["output_dir"] = str(path)
        return Layer(table, str(path / "config.toml"))
    if path.suffix in RECIPE_SUFFIXES and (path.exists() or path.suffix == ".toml"):
        table = _with_name(load_table(path), path.stem)
        trusted_code.recall(table)  # a run's config.toml is a recipe too
        if path.suffix == ".json" and "at_end" not in str(table.get("eval", "")):
            table = {**table, "eval.at_end": True}  # an experiment file wants its results in the same command
        return Layer(table, path.name)
    if path.suffix == ".py":
        from treadle.task_file import task_table

        return Layer(task_table(path), path.name)
    if path.is_dir() or path.suffix in DATA_SUFFIXES or target in BUNDLED:
        if not path.exists() and target not in BUNDLED:
            raise ConfigError(f"{path} does not exist; give a text file, a folder of text files, or a recipe")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", path.resolve().stem) or "run"
        return Layer({"data": {"path": str(path)}, "run": {"run_name": name.lstrip("._-") or "run"}}, str(path))
    if path.exists():
        raise ConfigError(f"{path}: treadle trains on {', '.join(DATA_SUFFIXES)} or folders of them, and reads recipes "
                          f"in {', '.join(RECIPE_SUFFIXES)}")  # fmt: skip
    raise ConfigError(f"{target!r} is no file, folder or built-in recipe: {nearest(target, list(builtin))}")


def _with_name(table: dict[str, Any], stem: str) -> dict[str, Any]:
    """The table with run_name defaulting to the recipe's own name, whichever word it uses for it."""
    words = {"run_name", "experiment_name"}
    places = [table, *(table.get(s) for s in ("run", "output", "experiment"))]
    if any(isinstance(place, dict) and words & {plain(str(k)) for k in place} for place in places):
        return table
    return {**table, "run.run_name": re.sub(r"[^A-Za-z0-9._-]", "_", stem)}


def compose(layers: list[Layer], with_model: bool = True) -> Recipe:
    """Layers, weakest first, as one validated Recipe.

    with_model=False leaves the model section raw (no torch); then a leaf name no core section knows is an error.
    """
    words = vocabulary()
    stacked = [(layer, merge(words.flatten(layer.table, layer.origin, layer.from_text))) for layer in layers]
    stacked = _with_deepspeed(words, stacked)
    arch, preset = DEFAULT_ARCHITECTURE, None
    reset = 0  # layers below this one described another model
    for number, (_, given) in enumerate(stacked):
        before = arch, preset
        for key, value in given.items():
            choice = _model_choice(key)
            if choice == "config_file":
                given_file = load_table(str(value.value))
                arch = MODELS.canonical(str(given_file.get("model_type", arch)))
            if choice == "arch":
                arch = MODELS.canonical(str(value.value))
            if choice == "preset":
                preset = None if value.value is None or plain(str(value.value)) == "none" else str(value.value)
        if (arch, preset) != before:
            reset = number
    model_class = MODELS.get(arch) if with_model else None
    if model_class is not None:
        words.sections["model"] = model_class.Config
        recommended = model_class.Config.recommended(preset)
        if recommended:
            origin = f"recommended for {arch} {preset}"
            stacked.insert(0, (Layer({}, origin), merge(words.flatten(recommended, origin))))
            reset += 1
    task = _task_class(stacked) if with_model else None
    if task is not None:
        words.sections["task"] = task
    final: dict[str, Given] = {}
    for number, (layer, given) in enumerate(stacked):
        given = {key: one for key, one in given.items() if number >= reset or not _of_model(key)}
        for key, one in _understood(words, given, with_model).items():
            stored = final.get(key)
            if stored is not None and one.value == "auto" and stored.origin == "the run":
                continue
            final[key] = Given(key, one.value, "the run" if layer.weak else one.origin, False)
    if model_class is not None:
        of_model = {k.partition(".")[2]: v.value for k, v in final.items() if k.startswith("model.")}
        for key, value in model_class.Config.with_preset(preset, **of_model).implied().items():
            final.setdefault(key, Given(key, value, "follows from the model's keys", False))
    sections = {
        name: build_section(name, cls, {k: v for k, v in final.items() if k.startswith(name + ".")})
        for name, cls in SECTIONS.items()
    }
    model = {k.partition(".")[2]: v.value for k, v in final.items() if k.startswith("model.")}
    of_task = {k: v for k, v in final.items() if k.startswith("task.")}
    asked = build_section("task", task, of_task).model_dump() if task is not None else {}
    origins = {key: given.origin for key, given in final.items()}
    notes = list(dict.fromkeys(words.notes))
    return Recipe(**sections, arch=arch, preset=preset, model=model, task=asked, origins=origins, notes=notes)  # type: ignore[arg-type]


def _task_class(stacked: Stacked) -> type[Settings] | None:
    """The class of [task]: the keys of the dataset and the objective that the layers choose, where they are not the usual
    ones."""
    chosen = {"data.dataset_class": TEXT, "train.objective": DEFAULT_OBJECTIVE}
    for _, given in stacked:
        chosen.update({key: str(given[key].value) for key in chosen if key in given})
    dataset, objective = chosen.values()
    if (dataset, objective) == (TEXT, DEFAULT_OBJECTIVE):
        return None  # without torch
    from treadle.objectives.task import task_class

    return task_class(dataset, objective)


def _model_choice(key: str) -> str | None:
    """arch, preset or config_file when a key names one of them (leaf names reach here as '?.name')."""
    section, _, name = key.partition(".")
    if section not in ("model", "?"):
        return None
    for choice, spellings in MODEL_CHOICE.items():
        if name in spellings and not (section == "?" and name == "type"):
            return choice
    return None


Stacked = list[tuple[Layer, dict[str, Given]]]


def _with_deepspeed(words: Vocabulary, stacked: Stacked) -> Stacked:
    """The layers with what a DeepSpeed file supplies: below everything explicit, which may not contradict it."""
    named = [given["parallel.deepspeed"].value for _, given in stacked if "parallel.deepspeed" in given]
    if not named or named[-1] is None:
        return stacked
    from treadle.distributed import deepspeed_json
    from treadle.distributed.environment import detect

    path = str(named[-1])
    table = deepspeed_json.supplied(deepspeed_json.read(path), detect().size)
    supplied = merge(words.flatten(table, path))
    for layer, given in stacked:
        for key, one in given.items():
            if layer.weak or key not in supplied or one.value == "auto":
                continue
            section, _, name = key.partition(".")
            wanted, theirs = (fit_value(SECTIONS[section], name, v, layer.from_text) for v in (one.value, supplied[key].value))
            if wanted != theirs:
                raise ConfigError(f"{key} = {wanted!r} ({one.origin}) contradicts {path}, which says {theirs!r}; change one "
                                  "of the two")  # fmt: skip
    below = sum(layer.weak for layer, _ in stacked)
    return [*stacked[:below], (Layer({}, path), supplied), *stacked[below:]]


def _of_model(key: str) -> bool:
    """Whether a key belongs to the model: named so, or a leaf that no core section knows."""
    return key.startswith(("model.", "?.")) and _model_choice(key) is None


def _understood(words: Vocabulary, given: dict[str, Given], with_model: bool) -> dict[str, Given]:
    """A layer with its model keys checked against the architecture's Config (when it is known)."""
    understood: list[Given] = []
    for key, one in given.items():
        section, _, name = key.partition(".")
        choice = _model_choice(key)
        if choice == "config_file":
            table = load_table(str(one.value))
            table.pop("model_type", None)
            understood += _understood(
                words, merge(words.flatten({"model": table}, str(one.value))), with_model
            ).values()
        elif choice is not None:
            continue
        elif section == "?" and not with_model:
            raise ConfigError(f"{one.origin}: unknown key: {nearest(name, words.all_names())}")
        elif with_model and (section == "task" or (section == "?" and name in words.names_of("task"))):
            understood.append(_open_key(words, "task", name, one, leaf=False))
        elif section in ("model", "?") and with_model:
            understood.append(_open_key(words, "model", name, one, leaf=section == "?"))
        else:
            understood.append(one)
    return merge(understood)


def _open_key(words: Vocabulary, section: str, name: str, one: Given, leaf: bool) -> Given:
    """A key of [model] or [task], checked against the class that is known by now."""
    if section not in words.sections:
        raise ConfigError(f"{one.origin}: there is no [{section}] here: the dataset and the objective have no keys of their own")
    cls = words.sections[section]
    names = words.names_of(section)
    if name not in names:
        known = words.all_names() if leaf else list(names)
        raise ConfigError(f"{one.origin}: unknown key: {nearest(name, known)}")
    if name in cls.translations:
        ((dotted, value),) = cls.translations[name](one.value).items()
        key = dotted.partition(".")[2]
    else:
        key, value = names[name], one.value
    if key != name:
        words.notes.append(f"{one.origin} is read as {section}.{key}")
    try:
        return Given(f"{section}.{key}", fit_value(cls, key, value, one.from_text), one.origin, False)
    except ConfigError as problem:
        raise ConfigError(f"{one.origin}: {section}.{problem}") from None


def settled_section(layers: list[Layer], name: str) -> Any:
    """One core section as the layers ask for it, without looking at the others (no torch, so that it answers at once)."""
    words = vocabulary()
    final: dict[str, Given] = {}
    for layer in layers:
        given = merge(words.flatten(layer.table, layer.origin, layer.from_text))
        final.update({key: one for key, one in given.items() if key.startswith(name + ".")})
    return build_section(name, SECTIONS[name], final)


def settled_folder(layers: list[Layer]) -> Path:
    """The run folder that layers ask for."""
    return Recipe(run=settled_section(layers, "run")).folder


def from_leaf_names(arch: str = DEFAULT_ARCHITECTURE, **values: Any) -> Recipe:
    """A Recipe from keyword arguments, any leaf name or alias: `from_leaf_names(max_steps=100, lr=1e-3)`."""
    trusted_code.allow_names([arch, values])
    return compose([Layer({"model.arch": arch, **values}, "arguments")])
