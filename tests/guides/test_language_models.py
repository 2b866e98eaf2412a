"""docs/language_models.md: its commands run in their order, its tables name what there is.

(Its Python is run with that of all documents, in tests/house/test_documents.py.)
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import treadle
from tests.conftest import make_text
from tests.guides.commands import DOCS, commands_of
from treadle.models.catalogue import MODELS
from treadle.recipe import vocabulary

DOCUMENT = (DOCS / "language_models.md").read_text()
COMMANDS = [shlex.split(line)[1:] for line in commands_of("language_models")]


def test_its_commands_run(in_folder: Path, typed: Callable[..., str]) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf (transformers) is not installed")
    (in_folder / "story.txt").write_text(make_text(2000))
    said = {}
    for words in COMMANDS:
        more = {"train": ("--eval_rows", "2", "--sample_tokens", "2"), "prepare": ("--workers", "1"), "plan": ("--flops", "1e12")}
        said[" ".join(words)] = typed(*words, *more.get("prepare" if words[:2] == ["data", "prepare"] else words[0], ()))
    assert len(said) == len(COMMANDS) == 16
    again = next(text for line, text in said.items() if line.endswith("--max_steps 30"))
    assert "Resumed from step 20" in again and "Finished at step 30" in again
    theirs, (ours, tokenizer) = transformers.AutoModelForCausalLM.from_pretrained("exported"), treadle.load("runs/first")
    text = "She had been told"
    ids = torch.as_tensor(tokenizer.encode(text)).long()[None]
    assert transformers.AutoTokenizer.from_pretrained("exported")(text)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(treadle.Batch.from_ids(ids)).logits, atol=1e-4, rtol=1e-4)


def test_a_trainers_arguments_are_keys_here() -> None:
    words = vocabulary()
    known = {name for section in words.sections for name in words.names_of(section)}
    known |= set(MODELS.get("transformer").Config.model_fields) | set(words.sections)
    rows = [line.split(" | ") for line in DOCUMENT.split("line by line")[1].split("As a program")[0].splitlines() if line.startswith("| `")]
    same = {name for theirs, here in rows if "the same names" in here for name in re.findall(r"(\w+)=", theirs)}
    assert len(same) > 15 and same <= known, same - known
    flags = set(re.findall(r"--([\w.]+)", DOCUMENT))
    own = {"format", "output", "from", "prompt", "data", "vocab", "text", "row", "memory", "recommend", "table", "max", "fresh", "allow",
           "num_processes", "temperature", "top_p", "repetition_penalty", "devices", "preset"}  # fmt: skip
    assert not {flag for flag in flags if flag.split(".")[-1] not in known | own}
