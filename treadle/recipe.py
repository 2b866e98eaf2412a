"""The whole configuration tree: every room's section, composed from defaults, presets, recipes and flags.

Precedence, weakest first: a section's defaults < the model's recommended values for a preset (recommended.py) < a continued run's own
config.toml < the recipe < flags. The model section stays a raw table until its architecture is known, so this file
imports no torch unless a model key has to be understood.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treadle import trusted_code
from treadle.checkpoint.layout import MANIFEST
from treadle.data.base import DATASET_OF_OBJECTIVE
from treadle.data.compressed import COMPRESSED
from treadle.data.settings import TEXT
from treadle.data.sources import BUNDLED, kind_of
from treadle.data.sources import SUFFIXES as DATA_SUFFIXES
from treadle.errors import ConfigError
from treadle.files import shipped
from treadle.foreign import advice, is_foreign_table, start_named
from treadle.models.catalogue import MODELS
from treadle.naming import Vocabulary, merge, settle
from treadle.objectives.settings import DEFAULT_OBJECTIVE
from treadle.recommended import fitting
from treadle.registry import nearest
from treadle.settings import Forgotten, Given, Settings, build_section, fit_value, load_table, plain, shown
from treadle.storage.remote import AnyPath, is_url, path_of
from treadle.training.config import DEFAULT_ARCHITECTURE, SECTIONS, Recipe

RECIPE_SUFFIXES = (".toml", ".yaml", ".yml", ".json")
DEFAULT_RECIPE = "austen"
# Keys of the model section that choose a model rather than describe it; they have no place in a model's own Config.
MODEL_CHOICE = {"arch": ("arch", "type", "architecture", "model_type"), "preset": ("preset", "model_size"),
                "config_file": ("config_file", "model_config", "model_config_file")}  # fmt: skip
# Flags that name a whole recipe (or its training half) beside or instead of the target.
RECIPE_FLAGS = ("config", "train_config")
RESUME_FLAGS = ("resume_from_checkpoint", "resume_from")
OF_CONVERSATIONS = ("data.chat_template", "data.train_on")
# Words at the top of an experiment file, whose writer wants evaluation and samples from the same command.
EXPERIMENT_WORDS = {"experiment_name", "experiment", "training", "output"}
NOT_OF_THE_SHAPE = ("model_type", "architectures", "torch_dtype", "transformers_version")


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
    "collatz": "task",
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
    unasked: bool = False  # the recipe of a command that names none: gives way to what an architecture implies
    folder: Path | None = None  # of the file it was read from: a model file it names may lie beside it
    trained: bool = False  # the model of --from, whose weights are not random
    other_flags: tuple[str, ...] = ()  # what the verb takes beside keys, for what a misspelt key may have meant


def builtin_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come along."""
    return shipped("recipes")


def target_layer(target: str | Mapping[str, Any] | None) -> Layer:
    """What a user named to train on (nothing, a built-in recipe, a recipe file, a task file, text, a folder, or a recipe's
    table) as a layer. ConfigError says why it is none of these."""
    if isinstance(target, Mapping):
        return Layer(dict(target), "recipe")
    builtin = builtin_recipes()
    if target is None:
        target = DEFAULT_RECIPE
    if is_url(target):
        return _text_layer(path_of(target), target)
    path = Path(target)
    if not path.exists() and target in builtin:
        path = builtin[target]
    if path.is_dir() and (path / MANIFEST).is_file():
        raise ConfigError(f"{path} is a checkpoint; go on from it with --resume_from {path}, or start a new run from its "
                          f"weights with --from {path}")  # fmt: skip
    if path.is_dir() and (path / "config.toml").is_file():
        return _run_layer(path)
    if path.suffix in RECIPE_SUFFIXES and (path.exists() or path.suffix == ".toml"):
        return recipe_layer(path)
    if path.suffix == ".py":
        from treadle.task_file import task_table

        return Layer(task_table(path), path.name)
    if path.is_dir() or kind_of(path) in DATA_SUFFIXES or target in BUNDLED:
        if not path.exists() and target not in BUNDLED:
            raise ConfigError(f"{path} does not exist; give a text file, a folder of text files, or a recipe")
        return _text_layer(path, str(path))
    if path.exists():
        raise ConfigError(f"{path}: treadle trains on {', '.join(DATA_SUFFIXES)} or folders of them, and reads recipes "
                          f"in {', '.join(RECIPE_SUFFIXES)}")  # fmt: skip
    raise ConfigError(f"{target!r} is no file, folder or built-in recipe: {nearest(target, list(builtin))}")


def _text_layer(path: AnyPath, written: str) -> Layer:
    """Text to train on; the run is called what the file or folder is."""
    bare = path.with_suffix("") if path.suffix in COMPRESSED else path
    name = re.sub(r"[^A-Za-z0-9._-]", "_", bare.resolve().stem).lstrip("._-")
    return Layer({"data": {"path": written}, "run": {"run_name": name or "run"}}, written)


def _run_layer(run: Path) -> Layer:
    table = load_table(run / "config.toml")
    trusted_code.recall(table)
    table.setdefault("run", {})["output_dir"] = str(run)
    return Layer(table, str(run / "config.toml"))


def recipe_layer(path: Path, named: bool = True) -> Layer:
    """A recipe file as a layer; `named` gives its run the file's name where it has none."""
    table = load_table(path)
    trusted_code.recall(table)  # a run's config.toml is a recipe too
    experiment = EXPERIMENT_WORDS & {plain(str(key).partition(".")[0]) for key in table}
    if named:
        table = _with_name(table, path.stem)
    if experiment and "at_end" not in str(table.get("eval", table.get("evaluation", ""))):
        table = {**table, "eval.at_end": True}
    return Layer(table, path.name, folder=path.parent)


def typed_layers(target: str | Mapping[str, Any] | None, typed: Layer, with_default: bool = True) -> list[Layer]:
    """What a user typed, weakest first: the target (or what --config names, or the run of --resume_from, or the default
    recipe), the files of --config and --train_config, the flags (`typed`)."""
    flags = typed.table
    rest = {key: value for key, value in flags.items() if plain(key) not in RECIPE_FLAGS}
    files = [Path(str(flags[key])) for word in RECIPE_FLAGS for key in flags if plain(key) == word]
    resume = [v for k, v in flags.items() if plain(k).removeprefix("checkpoint.") in RESUME_FLAGS and plain(str(v)) != "none"]
    layers = [recipe_layer(path, named=number == 0 and target is None) for number, path in enumerate(files)]
    if target is not None:
        first = target_layer(target)
        if layers and isinstance(first.table.get("data"), dict) and first.folder is None:  # text over what the files name
            named = any(_names_itself(layer.table) for layer in layers)
            layers.append(Layer({"data": first.table["data"]} if named else first.table, first.origin))
        else:
            layers.insert(0, first)
    elif not files and resume:
        layers = [_run_layer(run_of(str(resume[0])))]
    elif not files and with_default:
        layers = [replace(_default_layer(flags), unasked=True)]
    return [*layers, replace(typed, table=rest)]


def _default_layer(flags: Mapping[str, Any]) -> Layer:
    """The recipe of a command that names none; with a data set of its own (--dataset_name) that takes the text's place."""
    layer = target_layer(None)
    name = next((v for k, v in flags.items() if plain(k).removeprefix("data.") == "dataset_name" and plain(str(v)) != "none"), None)
    if name is None:
        return layer
    data = {key: value for key, value in layer.table.get("data", {}).items() if key != "path"}
    stem = str(name).rstrip("/").rpartition("/")[2].lstrip("._-")
    return replace(layer, table=_with_name({key: data if key == "data" else value for key, value in layer.table.items() if key != "run.run_name"}, stem))


def run_of(checkpoint: str) -> Path:
    """The folder of the run that a checkpoint (or RUN, RUN@STEP, RUN@best) belongs to. ConfigError when it is not here."""
    if (Path(checkpoint) / "config.toml").is_file() and not (Path(checkpoint) / MANIFEST).is_file():
        return Path(checkpoint)
    from treadle.models.pretrained import home_of, locate, read_config

    found = locate(checkpoint)
    written = read_config(found).get("run", {}).get("output_dir")
    for home in (home_of(found.folder), Path(str(written or "nowhere"))):
        if (home / "config.toml").is_file():
            return home
    raise ConfigError(f"the run of {found.folder} is not here ({written}); name it: treadle train RUN --resume_from {checkpoint}, "
                      f"or start a new one from its weights: --from {checkpoint}")  # fmt: skip


def _names_itself(table: dict[str, Any]) -> bool:
    words = {"run_name", "experiment_name"}
    places = [table, *(table.get(s) for s in ("run", "output", "experiment"))]
    return any(isinstance(place, dict) and words & {plain(str(k)).rpartition(".")[2] for k in place} for place in places)


def _with_name(table: dict[str, Any], stem: str) -> dict[str, Any]:
    """The table with run_name defaulting to the recipe's own name, whichever word it uses for it."""
    if _names_itself(table):
        return table
    return {**table, "run.run_name": re.sub(r"[^A-Za-z0-9._-]", "_", stem)}


def compose(layers: list[Layer], with_model: bool = True) -> Recipe:
    """Layers, weakest first, as one validated Recipe.

    with_model=False leaves the model section raw (no torch); then a leaf name no core section knows is an error.
    ConfigError for values that contradict each other.
    """
    words = vocabulary()
    words.other_flags = tuple(name for layer in layers for name in layer.other_flags)
    stacked = [(layer, _read(words, layer)) for layer in layers]
    stacked = _with_deepspeed(words, stacked)
    arch, preset, arch_from, preset_from = DEFAULT_ARCHITECTURE, None, -1, -1  # and the layers that chose them
    reset = 0  # layers below this one described another model
    files: dict[str, ModelFile] = {}
    for number, (layer, given) in enumerate(stacked):
        before = arch, preset
        chosen = {choice: one for key, one in given.items() if (choice := _model_choice(key)) is not None}
        file = ModelFile.read(chosen["config_file"], layer) if "config_file" in chosen else None
        if file is not None:
            files[chosen["config_file"].origin] = file
            arch, arch_from = file.arch or arch, number if file.arch is not None else arch_from
        if "arch" in chosen:
            arch, arch_from = MODELS.canonical(str(chosen["arch"].value)), number
            if file is not None and file.arch not in (None, arch):
                raise ConfigError(f"{chosen['arch'].origin} = {chosen['arch'].value!r} is {arch}, but {file.path} is of {file.arch}; "
                                  "leave one of the two out")  # fmt: skip
        if "preset" in chosen:
            value = chosen["preset"].value
            preset, preset_from = None if value is None or plain(str(value)) == "none" else str(value), number
        if (arch, preset) != before:
            reset = number
    if with_model and preset is not None and preset_from > arch_from:
        arch = _arch_of(preset, arch)
    model_class = MODELS.get(arch) if with_model else None
    recommended: dict[str, Any] = {}
    origin = f"recommended for {arch} {preset}"
    if model_class is not None:
        words.sections["model"], words.arch = model_class.Config, arch
        recommended = model_class.Config.recommended(preset)
        stacked.insert(0, (Layer({}, origin), merge(words.flatten(recommended, origin))))
        reset += 1
    dataset, objective, implied = _kinds(stacked)
    task = _task_class(dataset, objective) if with_model else None
    if task is not None:
        words.sections["task"] = task
    final: dict[str, Given] = {}
    unasked: set[str] = set()
    for number, (layer, given) in enumerate(stacked):
        given = {key: one for key, one in given.items() if number >= reset or not _of_model(key)}
        with _named_foreign(layer):
            meant = _understood(words, given, with_model, files)
        if "train.num_train_epochs" in meant and "train.max_steps" not in meant:
            final.pop("train.max_steps", None)  # who asks for passes over the data means them, whatever a recipe below says
        for key, one in meant.items():
            stored = final.get(key)
            if stored is not None and one.value == "auto" and stored.origin == "the run":
                continue
            (unasked.add if layer.unasked else unasked.discard)(key)
            final[key] = Given(key, settle(words.sections, one, stored), "the run" if layer.weak else one.origin, False)
    kept = fitting(recommended, {key: one.value for key, one in final.items()}, any(layer.trained for layer in layers))
    final = {key: one for key, one in final.items() if one.origin != origin or key in kept}
    if model_class is not None:
        of_model = {k.partition(".")[2]: v.value for k, v in final.items() if k.startswith("model.")}
        for key, value in model_class.Config.with_preset(preset, **of_model).implied().items():
            if key == "tokenizer.name" and "tokenizer.vocab_size" in final.keys() - unasked:
                continue  # who asks for a size asks for a tokenizer that is trained
            if key not in final or key in unasked:
                final[key] = Given(key, value, "follows from the model's keys", False)
    if implied:
        final["data.dataset_class"] = Given("data.dataset_class", dataset, f"follows from the objective {objective}", False)
    kind = final.get("data.dataset_class")
    if kind is None or kind.value == TEXT:
        for key in OF_CONVERSATIONS:
            if key in final.keys() - unasked and final[key].value != SECTIONS["data"].model_fields[key.partition(".")[2]].default:
                raise ConfigError(f"{final[key].origin}: {key} says how conversations are read, and this is text; add --objective sft, or "
                                  f"leave {key} out")  # fmt: skip
    if kind is not None and kind.value != TEXT and "train.seq_len_schedule" in unasked:
        del final["train.seq_len_schedule"]  # it cuts rows of text, and this data has rows of its own
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


@contextlib.contextmanager
def _named_foreign(layer: Layer) -> Iterator[None]:
    """An error in a file that looks like another trainer's says how to convert it."""
    try:
        yield
    except ConfigError as problem:
        if layer.folder is None or not is_foreign_table(layer.table):
            raise
        raise ConfigError(f"{problem}; {advice(layer.folder / layer.origin)}") from None


def _read(words: Vocabulary, layer: Layer) -> dict[str, Given]:
    with _named_foreign(layer):
        return merge(words.flatten(layer.table, layer.origin, layer.from_text))


def _kinds(stacked: Stacked) -> tuple[str, str, bool]:
    """(the dataset's class, the objective, whether the first follows from the second) that the layers choose."""
    chosen = {"data.dataset_class": "", "train.objective": DEFAULT_OBJECTIVE}
    for _, given in stacked:
        chosen.update({key: str(given[key].value) for key in chosen if key in given})
    dataset, objective = chosen.values()
    meant = DATASET_OF_OBJECTIVE.get(plain(objective)) if not dataset else None
    return dataset or meant or TEXT, objective, meant is not None


def _task_class(dataset: str, objective: str) -> type[Settings] | None:
    """The class of [task]: the keys of the dataset and the objective, where they are not the usual ones."""
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


@dataclass
class ModelFile:
    """A model's JSON (or TOML, YAML) file: which architecture it is of, where it says so, and the model's keys."""

    path: Path
    arch: str | None
    table: dict[str, Any]

    @staticmethod
    def read(given: Given, layer: Layer) -> ModelFile:
        """The file beside the recipe that names it, or as seen from the current folder. ConfigError when there is none."""
        written = Path(str(given.value))
        beside = layer.folder / written if layer.folder is not None else written
        path = beside if beside.is_file() else written
        if not path.is_file():
            places = " or ".join(dict.fromkeys(map(str, (beside, written))))
            raise ConfigError(f"{given.origin} = {given.value!r}: there is no {places}; give a model's JSON file, or choose one by "
                              "name: --model.arch NAME (treadle models lists them)")  # fmt: skip
        table = load_table(path)
        kind = table.get("model_type")
        shape = {key: value for key, value in table.items() if key not in NOT_OF_THE_SHAPE}
        return ModelFile(path, MODELS.canonical(str(kind)) if kind is not None else None, shape)


def _arch_of(preset: str, arch: str) -> str:
    """The architecture that has a preset of this name, chosen after (or without) an architecture: that one, or another."""
    name = plain(preset)
    for one in (arch, DEFAULT_ARCHITECTURE, *MODELS.names()):
        if name in {plain(known) for known in MODELS.get(one).Config.presets()}:
            return one
    return arch


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
    """Whether a key describes the model: named so, a leaf that no core section knows, or a file of such keys."""
    return key.startswith(("model.", "?.")) and _model_choice(key) in (None, "config_file")


def _understood(
    words: Vocabulary, given: dict[str, Given], with_model: bool, files: dict[str, ModelFile]
) -> dict[str, Given]:
    """A layer with its model keys checked against the architecture's Config (when it is known)."""
    understood: list[Given] = []
    for key, one in given.items():
        section, _, name = key.partition(".")
        choice = _model_choice(key)
        if choice == "config_file":
            file = files[one.origin]
            inside = merge(words.flatten({"model": file.table}, str(file.path)))
            for found in _understood(words, inside, with_model, files).values():
                found.fallback = True  # what stands beside the file's name changes the file's shape
                understood.append(found)
        elif choice is not None:
            continue
        elif section == "?" and not with_model:
            raise _unknown(words, name, one, [])
        elif with_model and (section == "task" or (section == "?" and name in words.names_of("task"))):
            understood += _open_keys(words, "task", name, one, leaf=False)
        elif section in ("model", "?") and with_model:
            understood += _open_keys(words, "model", name, one, leaf=section == "?")
        else:
            understood.append(one)
    return merge(understood)


def _unknown(words: Vocabulary, name: str, one: Given, own: list[str], of_model: bool = False) -> ConfigError:
    """The error for a key that nobody knows; the model's own keys are the likelier ones."""
    others = [] if of_model else [*words.all_names(), *words.other_flags, *(w for s in MODEL_CHOICE.values() for w in s)]
    near = start_named(name, one.value, words.other_flags) + nearest(name, others, preferred=own, otherwise="none is like it")
    of_arch = of_model or any(f"'{key}'" in near for key in own)
    place = f"keys of {words.arch}: treadle train --model.arch {words.arch} --help model" if of_arch else "all of them: treadle train --help all"
    return ConfigError(f"{one.origin} = {shown(one.value)}: unknown key: {near} ({place})")


def _open_keys(words: Vocabulary, section: str, name: str, one: Given, leaf: bool) -> list[Given]:
    """What a key of [model] or [task] (or a leaf that no core section knows) sets, checked against the class that is known by
    now."""
    if section not in words.sections:
        raise ConfigError(f"{one.origin}: there is no [{section}] here: the dataset and the objective have no keys of their own")
    cls = words.sections[section]
    names = words.names_of(section)
    if name not in names and not leaf and (elsewhere := words.elsewhere(name)) is not None:
        return words.given(elsewhere, name, one.value, one.origin, one.from_text)
    if name not in names:
        raise _unknown(words, name, one, list(names), of_model=not leaf)
    if name in cls.translations:
        try:
            found = cls.translations[name](one.value).items()
        except (TypeError, ValueError, KeyError, AttributeError, IndexError):
            raise ConfigError(f"{one.origin}: {name} = {one.value!r} is not understood") from None
        values = {dotted.partition(".")[2]: value for dotted, value in found}
    else:
        values = {names[name]: one.value}
    understood = []
    for key, value in values.items():
        if key != name:
            words.notes.append(f"{one.origin} is read as {section}.{key}")
        try:
            understood.append(Given(f"{section}.{key}", fit_value(cls, key, value, one.from_text), one.origin, False))
        except Forgotten:
            raise
        except ConfigError as problem:
            raise ConfigError(f"{one.origin}: {section}.{problem}") from None
    return understood


def settled_section(layers: list[Layer], name: str) -> Any:
    """One core section as the layers ask for it, without looking at the others (no torch, so that it answers at once)."""
    words = vocabulary()
    final: dict[str, Given] = {}
    for layer in layers:
        given = _read(words, layer)
        for key, one in given.items():
            if key.startswith(name + "."):
                final[key] = Given(key, settle(SECTIONS, one, final.get(key)), one.origin, False)
    return build_section(name, SECTIONS[name], final)


def settled_folder(layers: list[Layer]) -> Path:
    """The run folder that layers ask for."""
    return Recipe(run=settled_section(layers, "run")).folder


def from_leaf_names(arch: str = DEFAULT_ARCHITECTURE, **values: Any) -> Recipe:
    """A Recipe from keyword arguments, any leaf name or alias: `from_leaf_names(max_steps=100, lr=1e-3)`."""
    trusted_code.allow_names([arch, values])
    return compose([Layer({"model.arch": arch, **values}, "arguments")])
