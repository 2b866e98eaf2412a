"""The command lines of a document, and each of them made short: the same verb and flags, a model of a few thousand weights."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
LINE = re.compile(r"^(?: {4})?(treadle [a-z].*)$", re.M)
# Two layers at most, rows of 32 tokens, two steps: a command takes a second.
DENSE = {"model.hidden_size": "32", "num_layers": "1", "num_heads": "2"}
SHAPES = {
    "hnet": {"hidden_sizes": "[16, 24]", "num_blocks": "[[1, 0, 1], [1]]", "attention_heads": "2"},
    "hgrn_bit": {"model.hidden_size": "16", "num_layers": "1"},
    "ssm": {"model.hidden_size": "32", "num_layers": "1"},
}
SHORT = {"max_steps": "2", "batch_size": "2", "seq_len": "32", "eval_rows": "2", "sample_tokens": "2", "num_workers": "0", "logging_steps": "1",
         "preparation_workers": "1", "tokenizer.name": "byte"}  # fmt: skip
FEWER = {"max_steps", "mixer_steps", "hidden_steps"}  # what a command may ask much of


def commands_in(document: Path) -> list[str]:
    """Every `treadle ...` line of a document in its order, without the comment at its end."""
    text = re.sub(r"```python\n.*?```", "", document.read_text(), flags=re.S)
    return [shlex.join(shlex.split(line, comments=True)) for line in LINE.findall(text)]


def commands_of(guide: str) -> list[str]:
    """Those of docs/GUIDE.md."""
    return commands_in(DOCS / f"{guide}.md")


def _flags(words: list[str]) -> set[str]:
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def shortened(line: str) -> list[str]:
    """The words after `treadle`, with what makes the command short."""
    words = shlex.split(line)[1:]
    if words[0] == "sweep":  # two runs instead of twelve
        words = [word.partition(",")[0] if word.startswith("optim.learning_rate=") else {"3": "1"}.get(word, word) for word in words]
    if words[0] in ("train", "distill", "sweep") and "--help" not in words:
        return _training(words)
    if words[0] == "generate":
        words = [*words, *([] if "--max_new_tokens" in _flags(words) else ["--max-new-tokens", "3"])]
    if words[:2] == ["data", "prepare"]:
        words += ["--workers", "1"]
    if words[0] == "eval" and "--tasks" not in words:
        words += ["--samples", "1", "--rows", "4"]
    if words[0] == "check":
        words = _training(words)
    if words[0] == "plan" and "--recommend" not in words and "--table" not in words and "--gpu" not in words:
        words += ["--flops", "1e12"]
    return words


def _training(words: list[str]) -> list[str]:
    given = _flags(words)
    for flag in FEWER & given:
        words[words.index(f"--{flag}") + 1] = "2"
    chosen = " ".join(words)
    from_weights = "from" in given or words[0] == "distill"
    arch = next((name for name in SHAPES if re.search(rf"\b{name}\b", chosen)), "")
    shape = {} if from_weights or "model.config_file" in given else SHAPES.get(arch, DENSE)
    more = {**shape, **SHORT}
    if re.search(r"\b(sft|dpo)\b", chosen):
        more["seq_len"] = "512"  # a conversation is not cut
    if "recipes/hybrid" in chosen:
        more["num_layers"] = "4"  # one of each that it names
    if from_weights or {"data_path", "data.path", "config_file", "model.config_file"} & given:  # their tokenizer and rows are those of what is named
        more.pop("tokenizer.name")
    leaves = {name.rpartition(".")[2] for name in given}
    keep = {name: value for name, value in more.items() if name.rpartition(".")[2] not in leaves and name not in given}
    return [*words, *(part for name, value in keep.items() for part in (f"--{name}", value))]
