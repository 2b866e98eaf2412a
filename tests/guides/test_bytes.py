"""The byte-level guide: experiment files, model files, names of architectures, and what evaluates and generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_text
from treadle.errors import ConfigError
from treadle.recipe import Layer, compose, target_layer, typed_layers
from treadle.start import Request

Typed = Callable[..., str]
FLAT = {"model_type": "simplified_slm", "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 64}
DEEP = {"model_type": "hnet_bit", "vocab_size": 256, "d_model": [16, 24], "num_blocks": [[1, 0, 1], [1]]}


def experiment(folder: Path, texts: Path, kind: str, shape: dict[str, Any], **training: Any) -> Path:
    """An experiment.json as the guide writes it, its model's file beside it."""
    (folder / "model.json").write_text(json.dumps(shape))
    table = {
        "experiment_name": f"{kind}-experiment",
        "model": {"config_file": "model.json", "type": kind},
        "data": {"data_dir": str(texts), "max_seq_length": 32},
        "training": {"batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 2, "warmup_steps": 1,
                     "scheduler": "cosine", "mixed_precision": "no", **training},
        "output": {"checkpoint_dir": str(folder / "out" / "checkpoints"), "log_dir": str(folder / "out" / "logs")},
    }  # fmt: skip
    path = folder / "experiment.json"
    path.write_text(json.dumps(table))
    return path


def of(target: str | None = None, **flags: Any) -> Any:
    return compose(Request(target, flags).layers())


@pytest.mark.parametrize(("kind", "shape", "arch"), [("flat", FLAT, "hgrn_bit"), ("hierarchical", DEEP, "hnet")])
def test_an_experiment_file_runs(
    kind: str, shape: dict[str, Any], arch: str, in_folder: Path, texts: Path, typed: Typed
) -> None:
    """Trains, writes to its two places, and evaluates, samples and sums up at the end."""
    elsewhere = in_folder / "files"
    elsewhere.mkdir()
    said = typed("train", experiment(elsewhere, texts, kind, shape), "--sample_tokens", 2, "--eval_rows", 2)
    run = in_folder / "runs" / f"{kind}-experiment"
    assert f"{arch}: " in said and "2 steps of 4 rows x 32, fp32" in said
    assert list((elsewhere / "out" / "checkpoints").glob("step-*")) and (elsewhere / "out" / "logs" / "training_log.csv").is_file()
    assert (run / "summary.json").is_file() and (run / "results" / "generations.txt").is_file()
    results = json.loads((run / "results" / "evaluation_results.json").read_text())
    assert results["metrics"]["bpb"] > 0 and json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_the_same_file_in_three_formats(in_folder: Path, texts: Path) -> None:
    """JSON, YAML and TOML recipes behave alike."""
    path = experiment(in_folder, texts, "flat", FLAT)
    import yaml

    from treadle.settings import dump_toml

    table = json.loads(path.read_text())
    (in_folder / "experiment.yaml").write_text(yaml.safe_dump(table))
    name = table.pop("experiment_name")
    (in_folder / "experiment.toml").write_text(f'experiment_name = "{name}"\n' + dump_toml(table))
    tables = [of(str(path.with_suffix(suffix))).tables() for suffix in (".json", ".yaml", ".toml")]
    assert tables[0] == tables[1] == tables[2]
    assert tables[0]["eval"]["at_end"] and tables[0]["train"]["precision"] == "fp32" and tables[0]["model"]["arch"] == "hgrn_bit"


@pytest.mark.parametrize(
    ("word", "arch"),
    [("flat", "hgrn_bit"), ("simplified_slm", "hgrn_bit"), ("SimplifiedSLM", "hgrn_bit"), ("hgrn-bit", "hgrn_bit"),
     ("hierarchical", "hnet"), ("hnet_bit", "hnet"), ("HNet", "hnet")],
)  # fmt: skip
def test_names_of_architectures(word: str, arch: str) -> None:
    assert of(**{"model.arch": word}).arch == of(model_type=word).arch == arch


def test_byte_architectures_read_bytes(texts: Path) -> None:
    """Also of a text for which others train a tokenizer; another one has to be asked for."""
    for arch in ("hgrn_bit", "hnet"):
        recipe = of(**{"model.arch": arch})
        assert recipe.tokenizer.name == "byte" and recipe.origins["tokenizer.name"] == "follows from the model's keys"
        assert of(**{"model.arch": arch, "tokenizer.name": "bpe"}).tokenizer.name == "bpe"
        assert of(str(texts), **{"model.arch": arch}).tokenizer.name == "byte"
        assert of(str(texts), **{"model.arch": arch, "tokenizer.vocab_size": "512"}).tokenizer.name == "auto"
    assert of(str(texts), **{"model.arch": "transformer"}).tokenizer.name == "auto"
    assert of(**{"model.arch": "transformer"}).tokenizer.name == "bpe"  # the built-in recipe's


def test_prepared_text_of_another_tokenizer_is_refused(in_folder: Path, texts: Path, typed: Typed) -> None:
    typed("data", "prepare", texts, "--tokenizer", "bpe", "--vocab-size", 300, "--output", "prepared", "--workers", 1)
    keys = ("--data.path", "prepared", "--model.arch", "flat", "--hidden_size", 16, "--num_layers", 1, "--seq_len", 32,
            "--max_steps", 1, "--batch_size", 2, "--eval_rows", 2, "--sample_tokens", 0)  # fmt: skip
    with pytest.raises(ConfigError, match=r"prepared with a bpe tokenizer and tokenizer.name = byte.*--tokenizer.name auto"):
        typed("train", *keys)
    assert "Finished at step 1" in typed("train", *keys, "--tokenizer.name", "auto")


def test_a_model_file_alone(in_folder: Path) -> None:
    """Its model_type chooses the architecture, its keys the shape; a flag changes the shape."""
    (in_folder / "deep.json").write_text(json.dumps({**DEEP, "architectures": ["HNetBitForCausalLM"], "torch_dtype": "float32"}))
    for flag in ("model_config", "config_file", "model.config_file"):
        recipe = of(**{flag: "deep.json"})
        assert (recipe.arch, recipe.model["hidden_sizes"], recipe.tokenizer.name) == ("hnet", [16, 24], "byte")
    assert of(model_config="deep.json", num_blocks="[[2,0,2],[1]]").model["num_blocks"] == [[2, 0, 2], [1]]
    with pytest.raises(ConfigError, match=r"is hgrn_bit, but deep\.json is of hnet"):
        of(**{"model_config": "deep.json", "model.arch": "flat"})
    with pytest.raises(ConfigError, match=r"there is no nothing\.json"):
        of(model_config="nothing.json")


def test_config_and_train_config_name_recipes(in_folder: Path, texts: Path) -> None:
    whole = experiment(in_folder, texts, "flat", FLAT)
    (in_folder / "training.json").write_text(json.dumps({"learning_rate": 5e-4, "max_steps": 7}))
    recipe = of(config=str(whole))
    assert (recipe.arch, recipe.name, recipe.train.max_steps) == ("hgrn_bit", "flat-experiment", 2)
    both = of(config=str(whole), train_config="training.json")
    assert (both.arch, both.train.max_steps, both.optim.learning_rate) == ("hgrn_bit", 7, 5e-4)
    assert of(config=str(whole), max_steps="9").train.max_steps == 9
    text = of(str(texts), model_config="model.json", train_config="training.json")
    assert (text.arch, text.data.path, text.train.max_steps) == ("hgrn_bit", str(texts), 7)
    split = typed_layers(None, Layer({"model_config": "model.json", "train_config": "training.json", "data_dir": str(texts)}, "flag"))
    assert compose(split).data.path == str(texts)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    from treadle import train

    folder = tmp_path_factory.mktemp("run") / "flat"
    train(str(texts), quiet=True, output_dir=str(folder), arch="flat", hidden_size=16, num_layers=1, seq_len=32, batch_size=2,
          max_steps=4, save_steps=2, eval_steps=2, eval_rows=2, sample_tokens=0)  # fmt: skip
    return folder


def test_eval_takes_the_guides_flags(run: Path, in_folder: Path, typed: Typed) -> None:
    (in_folder / "unseen").mkdir()
    (in_folder / "unseen" / "a.txt").write_text(make_text(30, seed=9))
    words = ("--model_path", run, "--data_dir", "unseen", "--output_dir", "out", "--num_samples", 1, "--batch_size", 4)
    typed("eval", *words)
    found = json.loads((in_folder / "out" / "evaluation_results.json").read_text())
    assert found["data"] == "unseen" and (in_folder / "out" / "generations.txt").is_file()
    typed("eval", *(str(word).replace("_", "-") if str(word).startswith("--") else word for word in words))
    typed("eval", run, "--data", "unseen", "--output", "same", "--samples", 1, "--batch-size", 4)
    same = json.loads((in_folder / "same" / "evaluation_results.json").read_text())
    assert same["metrics"]["bpb"] == found["metrics"]["bpb"]
    with pytest.raises(ConfigError, match="name a run once"):
        typed("eval", run, "--model_path", run)
    with pytest.raises(ConfigError, match="name a run once"):
        typed("eval")


def test_generate_takes_the_guides_flags(run: Path, in_folder: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--prompt", "The", "--seed", 1)
    one = typed("generate", "--model_path", run, *asked, "--max_tokens", 5)
    assert one == typed("generate", "--model-path", run, *asked, "--max-tokens", 5) == typed("generate", run, *asked, "--max_new_tokens", 5)
    assert typed("generate", "--model_path", run, *asked, "--max_tokens", 5, "--num_samples", 2).startswith(one.rstrip("\n"))
    (in_folder / "prompts.txt").write_text("The\nShe\n")
    typed("generate", "--model_path", run, "--prompt_file", "prompts.txt", "--output_file", "out.txt", "--max_tokens", 3)
    assert "She" in (in_folder / "out.txt").read_text()
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    typed("generate", "--model_path", run, "--interactive")


def test_resume_from_alone_continues_its_run(run: Path, in_folder: Path, typed: Typed) -> None:
    """The checkpoint's run says the rest."""
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[0]
    said = typed("train", "--resume_from", checkpoint, "--max_steps", 5)
    assert f"Loading checkpoint: {checkpoint}" in said and "Resumed from step 2" in said and "Finished at step 5" in said
    assert f"Finished at step 5: {run}" in said and not (in_folder / "runs").exists()
    said = typed("train", "--resume_from_checkpoint", f"{run}@5", "--max_steps", 6)
    assert "Resumed from step 5" in said
    with pytest.raises(ConfigError, match="is a checkpoint; go on from it with --resume_from"):
        target_layer(str(next((run / "checkpoints").glob("step-*"))))


def test_prepare_takes_the_guides_flags(in_folder: Path, texts: Path, typed: Typed) -> None:
    said = typed("prepare", texts, "--output_dir", "prepared", "--max_seq_length", 64, "--max_samples", 2, "--tokenizer", "byte",
                 "--validation_fraction", 0.1, "--workers", 1)  # fmt: skip
    statistics = json.loads((in_folder / "prepared" / "statistics.json").read_text())
    assert "64 tokens" in said and sum(part["samples"] for part in statistics.values()) >= 2
    assert said.splitlines()[:1] == typed("data", "prepare", texts, "--output", "again", "--seq-len", 64, "--max-samples", 2,
        "--tokenizer", "byte", "--validation-fraction", 0.1, "--workers", 1).splitlines()[:1]  # fmt: skip


@pytest.mark.parametrize(
    ("typed_name", "ours"),
    [("best_model", "@best"), ("best.pt", "@best"), ("checkpoints/best_model.pt", "@best"), ("step_5000.pt", "@5000"),
     ("checkpoint-200", "@200"), ("checkpoints/step-12.pth", "@12")],
)  # fmt: skip
@pytest.mark.parametrize("exists", [True, False])
def test_other_trainers_names_of_checkpoints(typed_name: str, ours: str, exists: bool, in_folder: Path) -> None:
    from treadle.errors import InputError
    from treadle.models.pretrained import locate

    home = in_folder / "mine"
    (home / "checkpoints").mkdir(parents=True)
    (home / "config.toml").write_text("")
    if exists and "." in typed_name:
        (home / typed_name).write_bytes(b"")
    with pytest.raises(InputError, match=f"is mine{ours}$"):
        locate(f"mine/{typed_name}")
