"""What `treadle train` knows of other trainers: their files, for what a refusal says, and their flags that mean nothing here."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treadle.errors import ConfigError

# Words of transformers' TrainingArguments; a recipe of one's own has few of them side by side.
HUGGINGFACE = {"per_device_train_batch_size", "lr_scheduler_type", "adam_beta1", "num_train_epochs", "output_dir", "save_strategy",
               "eval_strategy", "logging_steps", "learning_rate", "optim"}  # fmt: skip
LITGPT = {"micro_batch_size", "lr_warmup_steps", "max_norm"}  # inside its table `train`
MANY = 4
# Flags of transformers' example scripts that ask for what happens anyway -> what is to be said of them.
IDLE = {
    "do_train": "training is what `treadle train` does",
    "do_eval": "held-out text is evaluated anyway, every eval.eval_steps",
    "overwrite_output_dir": "nothing is overwritten: the same command continues its run, --fresh starts anew in a new folder",
}
STARTS = ("model_name_or_path", "pretrained_model_name_or_path")


def idle(word: str, value: Any) -> str:
    """What to note of one of IDLE; ConfigError for a value that is no boolean, and for do_train = false."""
    if not isinstance(value, bool):
        raise ConfigError(f"{word} = {value!r}: (allowed: true, false)")
    if word == "do_train" and not value:
        raise ConfigError("do_train = False: to measure a run without training it: treadle eval RUN")
    return f"{word} is not needed: {IDLE[word]}"


def start_named(word: str, value: Any, flags: Sequence[str]) -> str:
    """The beginning of what is said of an unknown key that names weights to start from; empty for any other, and where the verb
    (which takes `flags`) has no --from."""
    return f"to start from that model, --from {value}; " if word in STARTS and "from" in flags else ""


def advice(path: Path) -> str:
    """What to type for a file of another trainer."""
    return f"another trainer's file? treadle convert {path}"


def is_foreign_table(table: Mapping[str, Any]) -> bool:
    """Whether a JSON or YAML file looks like TrainingArguments or a litgpt configuration."""
    train = table.get("train")
    if isinstance(train, Mapping) and LITGPT & set(train):
        return True
    for key, sign in (("precision", "-"), ("optim", "_")):  # bf16-mixed, adamw_torch
        if isinstance(table.get(key), str) and sign in table[key]:
            return True
    return is_training_arguments(table)


def is_training_arguments(table: Mapping[str, Any]) -> bool:
    """Whether a table is transformers' TrainingArguments: many of their words side by side, and no section of a recipe."""
    sections = any(isinstance(table.get(key), Mapping) for key in ("model", "train", "training", "data"))
    return len(HUGGINGFACE & set(table)) >= MANY and not sections


def defines_nothing(path: Path) -> bool:
    """Whether a Python file has no class and does not import treadle: constants, or a script. Read, never executed; a file that
    is no Python counts as one that may define something."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ClassDef) or any(name.partition(".")[0] == "treadle" for name in names):
            return False
    return True
