"""docs/coming_from.md: its files are written as shown and its commands run in their order; its tables name what there is.

(Its Python is run with that of all documents, in tests/house/test_documents.py.)
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import treadle
from treadle.models.catalogue import MODELS
from treadle.recipe import compose, recipe_layer, vocabulary

DOCUMENT = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text()
COMMANDS = [shlex.split(line)[1:] for line in re.findall(r"^    (treadle .*)$", DOCUMENT, flags=re.M)]


def test_its_commands_run(in_folder: Path, texts: Path, typed: Callable[..., str]) -> None:
    shutil.copytree(texts, in_folder / "texts")
    files = re.findall(r"^`(\w+\.(?:json|yaml|py))`[^`]*```(?:json|yaml|py)\n(.*?)```", DOCUMENT, flags=re.S | re.M)
    assert [name for name, _ in files] == ["shakespeare_char.py", "pretrain.yaml", "tune.py", "train_shc.py", "flat.json", "experiment.json", "config.json"]
    for name, text in files:
        (in_folder / name).write_text(text)
    said = {}
    for words in COMMANDS:
        more = {"train": ("--eval_rows", "2", "--sample_tokens", "2"), "check": ("--num_layers", "1"), "prepare": ("--workers", "1"),
                "eval": ("--samples", "1")}.get(words[0], ())  # fmt: skip
        said[" ".join(words)] = typed(*words, *more)
    assert len(said) == len(COMMANDS) == 16
    for words in COMMANDS:
        if words[0] == "convert":
            recipe = compose([recipe_layer(in_folder / words[-1])])
            assert recipe.train.max_steps and f"{words[-1]} written" in said[" ".join(words)]
    assert "Finished at step 4: runs/first" in said["train experiment.json"] and "hgrn_bit" in said["train experiment.json"]
    assert (in_folder / "out" / "logs" / "training_log.csv").is_file() and (in_folder / "out" / "results" / "evaluation_results.json").is_file()
    assert "Resumed from step 4" in said["train --resume_from out/checkpoints/step-00000004 --max_steps 6"]
    assert "Resumed from step 2" in said["train --config config.json --resume_from_checkpoint runs/config --max_steps 3"]
    assert (in_folder / "prepared" / "statistics.json").is_file() and (in_folder / "runs" / "again" / "summary.json").is_file()


def test_its_tables_name_what_there_is() -> None:
    """Every --flag in a table is a key (or one of the command line's words), on both sides."""
    words = vocabulary()
    known = {name for section in words.sections for name in words.names_of(section)} | set(words.sections)
    known |= {"model.arch", "model.preset", "model.config_file", "model_config", "config", "train_config", "model_size", "from"}
    known |= set(MODELS.get("transformer").Config.model_fields)
    rows = [line for line in DOCUMENT.splitlines() if line.startswith("|")]
    flags = {flag for row in rows for flag in re.findall(r"--([\w.]+)", row)}
    assert len(flags) > 12 and flags <= known, flags - known


@pytest.mark.parametrize("name", sorted(set(re.findall(r"treadle\.(\w+)\(", DOCUMENT))))
def test_its_functions_are_public(name: str) -> None:
    assert callable(getattr(treadle, name))
