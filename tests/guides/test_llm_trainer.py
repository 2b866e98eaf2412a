"""The LLM trainer's guide: its config.json as it stands, DeepSpeed's JSON beside it, and torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import SENTENCES
from treadle.errors import ConfigError
from treadle.recipe import Layer, compose
from treadle.start import Request

CONFIG: dict[str, Any] = {
    "model": {"vocab_size": 300, "d_model": 32, "n_heads": 2, "n_layers": 1, "d_ff": 64, "max_seq_len": 256, "dropout": 0.1,
              "attention_dropout": 0.1, "activation": "gelu", "pre_norm": True, "gradient_checkpointing": True},
    "training": {
        "batch_size": 2, "num_epochs": 1, "max_steps": 2, "learning_rate": 3e-4, "weight_decay": 0.01, "warmup_steps": 1,
        "lr_scheduler": "cosine", "optimizer": "adamw", "use_amp": False, "amp_dtype": "bfloat16", "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 1, "save_steps": 1, "eval_steps": 1, "logging_steps": 1, "checkpoint_dir": "kept",
        "report_to": ["tensorboard"], "save_total_limit": 2, "metric_for_best_model": "eval_loss",
        "early_stopping": True, "early_stopping_patience": 5, "early_stopping_threshold": 0.001, "compile_model": False,
        "world_size": 1, "distributed_backend": "gloo", "use_deepspeed": False, "deepspeed_config": "ds_config.json", "seed": 3,
    },
    "data": {"dataset_name": "wikitext", "dataset_config": "wikitext-2-raw-v1", "dataset_split": "train",
             "validation_split": "validation", "text_column": "text", "max_length": 32, "min_length": 4, "pack_sequences": True,
             "packing_strategy": "greedy", "preprocessing_num_workers": 1},
    "tokenizer": {"type": "bpe", "vocab_size": 300},
}  # fmt: skip
MEANT = {
    "model.hidden_size": 32, "model.num_heads": 2, "model.num_layers": 1, "model.intermediate_size": 64,
    "model.max_position_embeddings": 256, "model.dropout": 0.1, "model.attention_dropout": 0.1, "model.activation": "gelu",
    "model.pre_norm": True, "train.gradient_checkpointing": True, "train.per_device_train_batch_size": 2,
    "train.num_train_epochs": 1.0, "optim.learning_rate": 3e-4, "optim.weight_decay": 0.01, "optim.lr_scheduler_type": "cosine",
    "optim.name": "adamw", "train.precision": "fp32", "optim.max_grad_norm": 1.0, "checkpoint.save_steps": 1, "eval.eval_steps": 1,
    "log.logging_steps": 1, "checkpoint.checkpoint_dir": "kept", "log.report_to": ["tensorboard"],
    "checkpoint.save_total_limit": 2, "checkpoint.metric_for_best_model": "loss", "eval.early_stopping_patience": 5,
    "eval.early_stopping_threshold": 0.001, "train.torch_compile": False, "parallel.world_size": 1, "parallel.backend": "gloo",
    "parallel.deepspeed": None, "run.seed": 3, "data.dataset_name": "wikitext", "data.dataset_config": "wikitext-2-raw-v1",
    "data.split": "train", "data.validation_split": "validation", "data.seq_len": 32, "data.min_length": 4,
    "data.packing": "next_fit", "data.preparation_workers": 1, "tokenizer.name": "bpe",
}  # fmt: skip


def write(folder: Path, table: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(table))
    return str(path)


def changed(section: str, **keys: Any) -> dict[str, Any]:
    return {**CONFIG, section: {**CONFIG[section], **keys}}


def values(table: dict[str, Any]) -> dict[str, Any]:
    tables = compose([Layer(table, "config.json")]).tables()
    return {f"{section}.{key}": value for section, keys in tables.items() for key, value in keys.items()}


def test_every_key_means_what_it_says() -> None:
    found = values(CONFIG)
    assert {key: found.get(key) for key in MEANT} == MEANT


@pytest.mark.parametrize(
    ("section", "keys", "key", "value"),
    [
        ("training", {"use_amp": True}, "train.precision", "bf16"),
        ("training", {"use_amp": True, "amp_dtype": "float16"}, "train.precision", "fp16"),
        ("training", {"optimizer": "muon"}, "optim.name", "muon"),
        ("training", {"optimizer": {"type": "AdamW", "eps": 1e-7}}, "optim.adam_epsilon", 1e-7),
        ("training", {"early_stopping": False}, "eval.early_stopping_patience", None),
        ("training", {"early_stopping": {"patience": 4, "threshold": 0.1}, "early_stopping_patience": 4,
                      "early_stopping_threshold": 0.1}, "eval.early_stopping_patience", 4),
        ("training", {"use_deepspeed": True, "deepspeed_config": None}, "parallel.mode", "deepspeed"),
        ("training", {"report_to": "all"}, "log.report_to", ["csv", "jsonl", "tensorboard", "wandb"]),
        ("training", {"report_to": "none"}, "log.report_to", []),
        ("data", {"pack_sequences": False}, "data.packing", "none"),
        ("data", {"validation_split": 0.2}, "data.validation_fraction", 0.2),
        ("data", {"validation_split": "held.txt"}, "data.validation_path", "held.txt"),
    ],
)  # fmt: skip
def test_other_values_of_its_keys(section: str, keys: dict[str, Any], key: str, value: Any) -> None:
    assert values(changed(section, **keys))[key] == value


def test_early_stopping_alone_has_a_patience() -> None:
    training = {k: v for k, v in CONFIG["training"].items() if not k.startswith("early_stopping_")}
    assert values({**CONFIG, "training": training})["eval.early_stopping_patience"] == 3


class Rows:
    """What `datasets.load_dataset` returns, as far as a source looks."""

    column_names = ("text",)

    def __init__(self, split: str) -> None:
        self.texts = [f"{split} {SENTENCES[n % 5]}" for n in range(200 if split == "train" else 20)]
        self._fingerprint, self.dataset_size = split, 60 * len(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, part: slice) -> dict[str, list[str]]:
        return {"text": self.texts[part]}


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The `datasets` library, answering from memory; returns what was asked of it."""
    asked: list[tuple[str, ...]] = []
    library = ModuleType("datasets")

    def load_dataset(name: str, config: str | None, split: str) -> Rows:
        asked.append((name, str(config), split))
        return Rows(split)

    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return asked


def test_its_config_trains(in_folder: Path, hub: list[tuple[str, ...]], typed: Callable[..., str]) -> None:
    """`treadle train config.json`, and again by --config with --resume_from_checkpoint."""
    path = write(in_folder, CONFIG)
    said = typed("train", path, "--sample_tokens", 2)
    assert "transformer: " in said and "2 steps of 2 rows x 32, fp32" in said and "validation: 20 document(s)" in said
    assert hub[:2] == [("wikitext", "wikitext-2-raw-v1", "train"), ("wikitext", "wikitext-2-raw-v1", "validation")]
    assert "early_stopping is read" not in said  # its patience is given beside it
    assert 'style = "gpt2"' in (in_folder / "runs" / "config" / "config.toml").read_text()
    assert (in_folder / "runs" / "config" / "results" / "evaluation_results.json").is_file()
    assert list((in_folder / "kept").glob("step-*"))
    said = typed("train", "--config", path, "--resume_from_checkpoint", "runs/config", "--max_steps", 3, "--sample_tokens", 2)
    assert "Resumed from step 2" in said and "Finished at step 3" in said


@pytest.mark.slow
def test_torchrun_with_its_config(in_folder: Path) -> None:
    (in_folder / "story.txt").write_text("\n".join(SENTENCES * 100))
    data = {**{k: v for k, v in CONFIG["data"].items() if not k.startswith(("dataset", "validation"))}, "data_path": "story.txt"}
    path = write(in_folder, {**changed("training", world_size=2), "data": data, "eval": {"sample_tokens": 4}})
    for more, said in (([], "Finished at step 2"), (["--resume_from_checkpoint", "runs/config", "--max_steps", "3"], "Resumed from step 2")):
        out = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "treadle", "train",
             "--config", path, *more], capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert out.returncode == 0 and said in out.stdout, out.stdout + out.stderr


def test_a_deepspeed_file_is_honoured_and_checked(in_folder: Path) -> None:
    (in_folder / "ds_config.json").write_text(json.dumps({
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.01}}, "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1,
    }))  # fmt: skip
    training = {k: v for k, v in CONFIG["training"].items() if k not in ("use_amp", "amp_dtype")}
    asked = {**CONFIG, "training": {**training, "use_deepspeed": True}}
    found = values(asked)
    assert found["parallel.deepspeed"] == "ds_config.json" and found["train.precision"] == "fp16"
    with pytest.raises(ConfigError, match=r"contradicts ds_config\.json"):
        values({**asked, "training": {**asked["training"], "learning_rate": 1e-3}})


def test_flags_change_its_config(in_folder: Path) -> None:
    path = write(in_folder, CONFIG)
    recipe = compose(Request(None, {"config": path, "training.batch_size": "8", "d_model": "48"}).layers())
    assert recipe.train.per_device_train_batch_size == 8 and recipe.model["hidden_size"] == 48
