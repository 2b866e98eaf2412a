"""What a shell completes: verbs and their options (typer's part), runs, recipes, architectures and every key of the configuration.

A person waits for it at every press of a key, so torch and pydantic stay out: keys and their values are read from the source text
of the sections' classes. It never fails: where nothing is known, the shell completes file names.
"""

from __future__ import annotations

import ast
import functools
import itertools
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.files import shipped
from treadle.terminal import write

VARIABLE = "_TREADLE_COMPLETE"  # typer's scripts (treadle --show-completion) set it to complete_SHELL
PACKAGE = Path(__file__).parent
READ_AS_TARGET = (".toml", ".yaml", ".json", ".txt", ".jsonl", ".parquet", ".csv", ".py")
RUNS = ("run", "runs", "model_path", "draft", "teacher", "from")  # arguments and options that name a run
CHOICES = {
    "device": ("auto", "cpu", "cuda"), "weights": ("fp32", "bf16", "int8", "int4"), "split": ("validation", "test"),
    "layout": ("treadle", "huggingface", "gguf", "peft"), "quantize": ("int8", "int4"), "gguf_type": ("f32", "f16", "q8_0"),
    "chat_template": ("chatml", "llama3", "plain"), "speculative": ("ngram",), "on_bad": ("skip", "error"),
}  # fmt: skip
PLAIN = re.compile(r"[\w./@:+,=~-]+")  # a word that no shell reads as anything else: zsh evaluates what it is told


@dataclass(frozen=True)
class Word:
    """One completion, and what it means where that is short."""

    value: str
    help: str = ""


def answers(command: Any) -> bool:
    """Answers the shell that asks through VARIABLE; False where none asks, or one that is left to typer. `command` makes the
    verbs, as typer has them."""
    shell = os.environ.get(VARIABLE, "").removeprefix("complete_")
    if shell == "bash":
        words = _split(os.environ.get("COMP_WORDS", ""))
        place = int(os.environ.get("COMP_CWORD") or len(words) - 1)
        typed, start = words[1:place], words[place] if place < len(words) else ""
    elif shell in ("zsh", "fish"):
        line = os.environ.get("_TYPER_COMPLETE_ARGS", "")
        typed = _split(line)[1:]
        start = typed.pop() if typed and not line.endswith(" ") else ""
    else:
        return False
    found = [word for word in words_for(command(), typed, start) if PLAIN.fullmatch(word.value)]
    if shell == "bash":
        write("\n".join(word.value for word in found))
    elif shell == "zsh":
        listed = "\n".join(f'"{_for_zsh(word.value)}"' + (f':"{_for_zsh(word.help)}"' if word.help else "") for word in found)
        write(f"_arguments '*: :(({listed}))'" if found else "_files")
    elif os.environ.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        raise SystemExit(0 if found else 1)  # 1: fish completes file names
    else:
        write("\n".join(f"{word.value}\t{word.help}" if word.help else word.value for word in found))
    return True


def _split(line: str) -> list[str]:
    """The words of a line that is being typed, whose last quotation may still be open."""
    for end in ("", "'", '"'):
        try:
            return shlex.split(line + end)
        except ValueError:
            continue
    return line.split()


def _for_zsh(text: str) -> str:
    return re.sub(r"[^\w./@+,=~ -]", lambda found: "\\\\:" if found[0] == ":" else " ", text)


def words_for(command: Any, typed: list[str], start: str) -> list[Word]:
    """What may stand in place of `start` after the words `typed`; nothing where only a file's name helps."""
    typed = [word for word in typed if word != "="]  # bash parts --key=value there
    if start == "=":
        start = ""
    rest = list(typed)
    while hasattr(command, "commands"):
        verb = next((i for i, word in enumerate(rest) if word in command.commands), None)
        if verb is None:
            break
        command, rest = command.commands[rest[verb]], rest[verb + 1 :]
    options = {flag: p for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("-")}
    last = options.get(rest[-1].replace("_", "-")) if rest and rest[-1].startswith("-") else None
    takes_keys = command.context_settings.get("ignore_unknown_options", False)
    if start.startswith("-"):
        own = [Word(flag, _short(p.help)) for flag, p in options.items() if flag.startswith(start) and not p.hidden]
        return [*own, *(_flags(command.name, _architecture(rest), start) if takes_keys else [Word("--help")] if "--help".startswith(start) else [])]
    if last is not None and not last.is_flag:
        return [Word(value) for value in _of_parameter(last.name, start)]
    if hasattr(command, "commands"):
        return [Word(n, _short(c.help)) for n, c in command.commands.items() if n.startswith(start) and not c.hidden]
    if takes_keys:
        return [Word(value) for value in _after_keys(rest, start)]
    position = sum(not word.startswith("-") and (i == 0 or not _takes_value(options, rest[i - 1])) for i, word in enumerate(rest))
    arguments = [p for p in command.params if not any(flag.startswith("-") for flag in p.opts)]
    here = arguments[min(position, len(arguments) - 1)] if arguments and (position < len(arguments) or arguments[-1].nargs < 0) else None
    return [Word(value) for value in _of_parameter(here.name, start)] if here is not None else []


def _short(text: str | None) -> str:
    """The first sentence of a help text."""
    return re.split(r"(?<=[.:;]) |\n", text or "")[0].rstrip(".:;")


def _takes_value(options: dict[str, Any], word: str) -> bool:
    option = options.get(word.replace("_", "-")) if word.startswith("-") else None
    return option is not None and not option.is_flag


def _of_parameter(name: str, start: str) -> list[str]:
    """Values of an argument or option of a verb, by its name."""
    if name in RUNS:
        return runs(start)
    return _starting(CHOICES.get(name, ()), start)


def _starting(words: Iterable[str], start: str) -> list[str]:
    return [word for word in words if word.startswith(start)]


def runs(start: str) -> list[str]:
    """`last`, folders under runs/ (or under the folder that is being typed), and after @ the checkpoints of a run."""
    name, at, _ = start.partition("@")
    if at:
        steps = sorted({int(found[0]) for p in Path(name).glob("checkpoints/*") if (found := re.search(r"\d+$", p.name))}, reverse=True)
        return _starting([f"{name}@{choice}" for choice in ("best", *steps)], start)
    parent = Path(os.path.dirname(start)) if "/" in start else Path("runs")
    try:
        folders = sorted(str(p) for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        folders = []
    return _starting([*(["last"] if "/" not in start else []), *folders], start)


def targets(start: str) -> list[str]:
    """What `treadle train` trains on: built-in recipes, and files and folders here."""
    near = Path(os.path.dirname(start))
    try:
        paths = [f"{p}/" if p.is_dir() else str(p) for p in sorted(near.iterdir())
                 if not p.name.startswith(".") and (p.is_dir() or p.suffix in READ_AS_TARGET)]  # fmt: skip
    except OSError:
        paths = []
    return _starting([*shipped("recipes"), *paths], start)


def architectures() -> list[str]:
    from treadle.models.catalogue import MODELS

    return MODELS.names()


def _architecture(typed: list[str]) -> str | None:
    return next((b for a, b in itertools.pairwise(typed) if a in ("--model.arch", "--arch")), None)


def _after_keys(typed: list[str], start: str) -> list[str]:
    """What follows in `train` and its like, which take every key as a flag: a value of the last flag, or the target."""
    flag = typed[-1] if typed and typed[-1].startswith("--") else None
    if flag is None:
        return targets(start) if not any(word.startswith("--") for word in typed) else []
    sections = section_keys(_architecture(typed))
    name = flag[2:].replace("-", "_")
    if name == "help":
        return _starting(["all", *sections, *(key for keys in sections.values() for key in keys)], start)
    if name in ("model.arch", "arch"):
        return _starting(architectures(), start)
    if name in RUNS:
        return runs(start)
    known = [values for section, keys in sections.items() for key, values in keys.items() if name in (key, f"{section}.{key}")]
    return _starting(known[0], start) if known else []


def _flags(verb: str, arch: str | None, start: str) -> list[Word]:
    """The verb's own flags, and keys: by the name alone where one section has it, with the section where a dot was typed. They
    come with - or _ as the typed word has them."""
    sections = section_keys(arch)
    names = [key for keys in sections.values() for key in keys]
    keys = [f"--{section}.{key}" if "." in start or names.count(key) > 1 else f"--{key}" for section, keys in sections.items() for key in keys]
    dashes = "-" in start[2:] and "_" not in start
    words = [*own_flags(verb), "--model.arch", "--model.preset", *(key if not dashes else f"--{key[2:].replace('_', '-')}" for key in keys)]
    return [Word(word) for word in dict.fromkeys(_starting(words, start))]


@functools.cache
def own_flags(verb: str) -> list[str]:
    """The flags that the help of a verb tells of beside keys."""
    texts = _module("treadle.help").assigned.get("INTRODUCTION")
    told = {ast.literal_eval(k): ast.literal_eval(v) for k, v in zip(texts.keys, texts.values) if k} if isinstance(texts, ast.Dict) else {}
    return [*re.findall(r"^  (--[a-z-]+)", told.get(verb, ""), flags=re.M), "--help"]


@functools.cache
def section_keys(arch: str | None = None) -> dict[str, dict[str, tuple[str, ...]]]:
    """Section -> key -> the values it is known to take, of `train --help all`; the model's are those of an architecture."""
    from treadle.models.catalogue import MODELS

    config = _module("treadle.training.config")
    listed = config.assigned.get("SECTIONS")
    found = {}
    if isinstance(listed, ast.Dict):
        for name, cls in zip(listed.keys, listed.values):
            if isinstance(name, ast.Constant) and isinstance(cls, ast.Name):
                found[str(name.value)] = _keys_of(config, cls.id)
    default = config.assigned.get("DEFAULT_ARCHITECTURE")
    place = MODELS.place(arch or (str(default.value) if isinstance(default, ast.Constant) else ""))
    if place is not None:
        module, _, cls_name = place.partition(":")
        found["model"] = _keys_of(_module(module), f"{cls_name}.Config")
    return found


# ---- classes of sections, read and not imported


@dataclass(frozen=True)
class _Module:
    """The text of one module: its classes, what names at its top are set to, and where its imported names are from."""

    classes: dict[str, ast.ClassDef]
    assigned: dict[str, ast.expr]
    imported: dict[str, tuple[str, str]]


@functools.cache
def _module(name: str) -> _Module:
    path = PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py")
    found = _Module({}, {}, {})
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []:
        if isinstance(node, ast.ClassDef):
            found.classes[node.name] = node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("treadle"):
            found.imported.update({alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names})
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.assigned[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found.assigned[node.target.id] = node.value
    return found


def _home(module: _Module, name: str) -> tuple[_Module, str]:
    """The module that a name is from, and its name there."""
    while name not in module.classes and name not in module.assigned and name in module.imported:
        place, name = module.imported[name]
        module = _module(place)
    return module, name


def _keys_of(module: _Module, name: str) -> dict[str, tuple[str, ...]]:
    """Fields of a section's class, bases first; `Model.Config` is the class that a model's `Config = ...` names."""
    name, _, inner = name.partition(".")
    module, name = _home(module, name)
    cls = module.classes.get(name)
    if cls is None:
        return {}
    if inner:
        named = [n.value for n in cls.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and n.targets[0].id == inner]
        return _keys_of(module, named[0].id) if named and isinstance(named[0], ast.Name) else {}
    found: dict[str, tuple[str, ...]] = {}
    for base in reversed(cls.bases):
        if isinstance(base, ast.Name) and base.id != "Settings":
            found |= _keys_of(module, base.id)
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and "ClassVar" not in ast.dump(node.annotation):
            found[node.target.id] = tuple(dict.fromkeys(_values(module, node.annotation)))
    return found


def _values(module: _Module, annotation: ast.expr) -> list[str]:
    """The words that an annotation allows: of bool and Literal, through names, `|` and Annotated."""
    if isinstance(annotation, ast.Name) and annotation.id == "bool":
        return ["true", "false"]
    if isinstance(annotation, ast.Name):
        module, name = _home(module, annotation.id)
        return _values(module, module.assigned[name]) if name in module.assigned else []
    if isinstance(annotation, ast.BinOp):
        return [*_values(module, annotation.left), *_values(module, annotation.right)]
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if annotation.value.id == "Annotated":
            return _values(module, inner[0])
        if annotation.value.id == "Literal":
            return [str(node.value) for node in inner if isinstance(node, ast.Constant)]
    return []
