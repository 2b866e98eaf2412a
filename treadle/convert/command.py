"""`treadle convert FILE`: which trainer a file is of, its recipe, and whether that says the same."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.convert import own, writing
from treadle.convert.reading import Reading
from treadle.errors import ConfigError, InputError
from treadle.files import write_atomically
from treadle.foreign import is_training_arguments
from treadle.registry import nearest
from treadle.settings import load_table, plain

# Kind -> what a file of it is.
KINDS = {
    "shc": "constants, flags and TrainingArguments of a multi-stream (SHC) script, .py",
    "bytes": "an experiment or a model of SimplifiedSLM or H-Net, .json",
    "complexity": "a configuration of the Complexity framework, .yaml or .json",
    "llm_trainer": "a config.json with model, training and data",
    "collatz": "the Collatz script's constants, .py",
    "huggingface": "TrainingArguments, as Trainer writes them (.json) or as a script builds them (.py)",
    "litgpt": "a litgpt configuration, .yaml",
    "nanogpt": "a nanoGPT config, .py",
    "recipe": "a recipe of treadle's, .toml, .yaml or .json",
}


@dataclass
class Converted:
    """A recipe's text, and what is to be said about it, a line each."""

    kind: str
    text: str
    said: list[str]


def convert(path: Path, kind: str | None = None) -> Converted:
    """The recipe of a foreign configuration. InputError or ConfigError where the file is none."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; treadle convert FILE reads {', '.join(KINDS)}")
    if kind is not None and plain(kind) not in KINDS:
        raise ConfigError(f"--kind {kind!r}: {nearest(plain(kind), list(KINDS))}; there is: {', '.join(KINDS)}")
    reading = _script(path, kind) if path.suffix == ".py" else _table(path, kind)
    recipe = writing.settled(reading, path.name, path.parent)
    text = writing.text_of(reading, recipe, path.name)
    _verify(text, recipe, path)
    said = [f"{path}: {KINDS[reading.kind]}"]
    said += [f"to be set: {one}" for one in reading.missing]
    said += [f"no equivalent: {one}" for one in reading.left] + [f"assumed: {one}" for one in reading.assumed]
    return Converted(reading.kind, text, said)


def _script(path: Path, kind: str | None) -> Reading:
    from treadle.convert import huggingface, nanogpt
    from treadle.convert.script import read_script, refuse_task

    script = read_script(path)
    refuse_task(script)
    found = plain(kind) if kind is not None else None
    if found is None:
        words = {plain(name) for name in (*script.constants, *script.flags)}
        if huggingface.is_script(script):
            found = "huggingface"
        elif nanogpt.is_config(script.constants):
            found = "nanogpt"
        elif {"d_model", "nhead"} & words and "collatz" in path.read_text(encoding="utf-8").lower():
            found = "collatz"
        elif script.constants or script.flags or script.arguments:
            found = "shc"
        else:
            raise ConfigError(f"{path} sets no constants that a trainer would take; treadle convert reads {', '.join(KINDS)}")
    if found == "huggingface":
        return huggingface.read_script_arguments(script)
    if found == "nanogpt":
        return nanogpt.read(script)
    if found in ("shc", "collatz"):
        return own.read_constants(found, script)
    raise ConfigError(f"--kind {found} is read from {KINDS[found].rpartition(', ')[2]}, and {path} is a script")


def _table(path: Path, kind: str | None) -> Reading:
    from treadle.convert import huggingface, litgpt

    table = load_table(path)
    found = plain(kind) if kind is not None else _kind_of(table)
    if found == "huggingface":
        return huggingface.read_arguments(table, path.stem)
    if found == "litgpt":
        return litgpt.read(table, path)
    if found == "nanogpt":
        raise ConfigError(f"--kind {found} is read from .py, and {path} is a table")
    return own.read_table(found, path)


def _kind_of(table: dict[str, Any]) -> str:
    from treadle.convert import litgpt

    if litgpt.is_config(table):
        return "litgpt"
    if is_training_arguments(table):
        return "huggingface"
    words = {plain(str(key)) for key in table}
    inner = table.get("model") if isinstance(table.get("model"), dict) else table
    shape = {plain(str(key)) for key in inner} if isinstance(inner, dict) else set()
    kind = str(inner.get("model_type", inner.get("type", ""))) if isinstance(inner, dict) else ""
    if "experiment_name" in words or "config_file" in shape or plain(kind) in ("simplified_slm", "hnet_bit", "flat", "hierarchical"):
        return "bytes"
    if {"model", "training", "data"} <= words:
        return "llm_trainer"
    return "complexity" if {"use_inl_dynamics", "use_token_routed_mlp", "num_experts"} & (shape | words) else "recipe"


def _verify(text: str, recipe: Any, path: Path) -> None:
    """The text reads as the same configuration; anything else is a defect of this room, and said."""
    from treadle.recipe import compose, recipe_layer

    with tempfile.TemporaryDirectory(prefix="treadle-convert-") as folder:
        written = Path(folder) / "recipe.toml"
        written.write_text(text, encoding="utf-8")
        again = compose([recipe_layer(written, named=False)]).tables()
    for section, table in recipe.tables().items():
        for key, value in table.items():
            if again.get(section, {}).get(key) != value:
                raise ConfigError(f"{path}: {section}.{key} = {value!r} cannot be written as a recipe says it; train the file itself: treadle train {path}")


def write(converted: Converted, output: Path) -> None:
    """The recipe's file; one that says something else is not written over."""
    if output.exists() and output.read_text(encoding="utf-8") != converted.text:
        raise ConfigError(f"{output} is there already and says something else; give --output another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, converted.text)
