"""A small run for the tests of lm-evaluation-harness, written without training: random weights that prefer some tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml

from tests.conftest import make_text
from treadle.checkpoint import writer
from treadle.models.base import build, describe
from treadle.text.base import Tokenizer
from treadle.text.trained import BPETokenizer

SHAPE = {"style": "llama", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 400, "max_position_embeddings": 48}
TEXTS = [line for line in make_text(60).splitlines() if line]


def a_run(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = build("transformer", None, **SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokenizer: Tokenizer = BPETokenizer.trained_on(iter(TEXTS), 400)
    tokenizer.save(folder / "tokenizer")
    lines = ['[model]\narch = "transformer"', *(f"{key} = {json.dumps(value)}" for key, value in SHAPE.items()), '[tokenizer]\nname = "bpe"']
    members = {"config.toml": ("\n".join(lines) + "\n").encode(), "config.json": describe(type(model), model.config).encode()}
    members |= {f"tokenizer/{path.name}": path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    writer.save(folder / "checkpoints", 3, {"model": {n: t.detach() for n, t in model.named_weights().items()}}, members, {"weights_only": False})
    (folder / "config.toml").write_bytes(members["config.toml"])
    return folder


TASKS = {
    "rhymes": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
               "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
    "whole": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
              "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
    "writing": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{text}}",
                "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}, {"metric": "bleu"}]},
}  # fmt: skip


def write_tasks(folder: Path, count: int = 14) -> str:
    """The files of TASKS with their data beside them -> what --tasks takes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.json").open("w") as file:
        for i in range(count):
            words = TEXTS[i % len(TEXTS)].split()
            choices = [" " + words[1], f" {words[2]} {words[3]}", " " + " ".join(words[1:5]), "  " + words[0]]
            file.write(json.dumps({"question": " ".join(words[: 2 + i % 5]) + " " * (i % 3), "choices": choices, "answer": i % 4,
                                   "text": " ".join(TEXTS[i : i + 1 + i % 3])}) + "\n")  # fmt: skip
    for name, keys in TASKS.items():
        table = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "data.json"}}, "test_split": "test",
                 "fewshot_split": "test", **keys}  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    return ",".join(str(folder / f"{name}.yaml") for name in TASKS)
