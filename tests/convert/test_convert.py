"""`treadle convert`: each kind is told apart, its recipe is accepted by `treadle check`, and what has no equivalent is said."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import make_text, treadle
from tests.convert.files import FILES, FLAT
from treadle.cli import app
from treadle.convert.command import KINDS, convert, write
from treadle.convert.script import read_script
from treadle.errors import ConfigError, InputError
from treadle.recipe import compose, recipe_layer, target_layer
from treadle.training.config import Recipe


@pytest.fixture()
def here(in_folder: Path) -> Path:
    """A folder with every file, and the text that some of them name."""
    (in_folder / "texts").mkdir()
    (in_folder / "texts" / "story.txt").write_text(make_text(400))
    (in_folder / "flat.json").write_text(FLAT)
    for name, (_, text) in FILES.items():
        (in_folder / name).write_text(text)
    return in_folder


def recipe_of(text: str, folder: Path) -> Recipe:
    (folder / "read.toml").write_text(text)
    return compose([recipe_layer(folder / "read.toml", named=False)])


def values(text: str, folder: Path) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, table in recipe_of(text, folder).tables().items() for key, value in table.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_that_check_accepts(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = FILES[name][0]
    app(["convert", name, "--output", "made.toml"], prog_name="treadle", standalone_mode=False)
    said = capsys.readouterr()
    assert said.err.startswith(f"{name}: {KINDS[kind]}\n") and "treadle check made.toml" in said.out
    text = (here / "made.toml").read_text()
    left = [line.removeprefix("no equivalent: ") for line in said.err.splitlines() if line.startswith("no equivalent: ")]
    comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert all(" ".join(one.split()) in comments for one in left)  # on stderr, and at the top of the recipe
    from treadle.dry_run import check
    from treadle.start import Request

    short = {"data.path": "texts"} if 'path = "austen"' in text else {}  # what stands in takes seconds to prepare
    found = check(Request("made.toml", {"num_workers": "0", "train.precision": "fp32", "eval_rows": "2", **short}))
    assert found["loss"] > 0


LEFT = {
    "shakespeare_char.py": ["bias (nanoGPT's default)", "dataset", "lr_decay_iters"],
    "pretrain.yaml": ["logger_name", "model_config.parallel_residual", "tokenizer_dir"],
    "arguments.json": ["neftune_noise_alpha", "optim", "push_to_hub", "report_to", "save_strategy"],
    "sft.py": ["run_name"],
    "shc_train.py": ["tracking_uri"],
    "collatz_train.py": ["CHECKPOINT_FILE", "NUM_WORKERS"],
    "complexity.yaml": ["model.num_experts", "model.use_token_routed_mlp"],
    "experiment.json": [],
    "config.json": [],
}


@pytest.mark.parametrize("name", FILES)
def test_what_has_no_equivalent(name: str, here: Path) -> None:
    made = convert(Path(name))
    said = [line.removeprefix("no equivalent: ") for line in made.said if line.startswith("no equivalent: ")]
    assert sorted(line.split(" = ")[0].split(":")[0] for line in said) == LEFT[name]
    assert all(len(line.split(": ", 1)[1]) > 10 for line in said)  # each with its reason


def test_values_of_nanogpt(here: Path) -> None:
    found = values(convert(Path("shakespeare_char.py")).text, here)
    wanted = {"train.gradient_accumulation_steps": 40, "train.max_steps": 5000, "optim.learning_rate": 1e-3, "optim.min_lr": 1e-4,
              "optim.adam_beta2": 0.99, "optim.adam_beta1": 0.9, "optim.warmup_steps": 2000, "optim.max_grad_norm": 1.0, "data.seq_len": 32,
              "model.style": "gpt2", "model.attention_bias": False, "tokenizer.name": "char", "eval.eval_rows": 4, "run.run_name": "mini-gpt",
              "run.device": "cpu", "train.torch_compile": False, "data.path": "austen", "log.report_to": ["csv", "jsonl", "tensorboard"]}  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted


def test_what_nanogpt_leaves_out_is_marked(here: Path) -> None:
    """Each of its defaults, and no value of the file; what goes without a key is said."""
    text = FILES["shakespeare_char.py"][1]
    made = convert(Path("shakespeare_char.py"))
    marked = {line.partition("# ")[2].removesuffix(" (nanoGPT's default)"): line.split()[0] for line in made.text.splitlines() if line.endswith("(nanoGPT's default)")}
    assert not [word for word in marked if f"\n{word} =" in text]
    assert {"dropout", "weight_decay", "beta1", "grad_clip", "decay_lr", "warmup_iters", "log_interval", "bias"} == set(marked)
    assert not any("always_save_checkpoint" in line for line in made.said)
    assert any(line.startswith("assumed: eval.eval_rows = 4: ") for line in made.said)
    (here / "again.py").write_text(text + "lr_decay_iters = 5000\nalways_save_checkpoint = False\n")
    said = convert(Path("again.py")).said
    assert "assumed: lr_decay_iters = 5000: the last step, until which the rate falls here anyway" in said
    assert any(line.startswith("no equivalent: always_save_checkpoint = False: ") for line in said)
    (here / "again.py").write_text(text + "decay_lr = False\n")
    assert "no equivalent: lr_decay_iters = 4000: the rate does not fall (decay_lr = False)" in convert(Path("again.py")).said


def test_nanogpt_from_weights_and_its_text(here: Path) -> None:
    (here / "config").mkdir()
    (here / "data" / "mine").mkdir(parents=True)
    (here / "data" / "mine" / "input.txt").write_text("text")
    (here / "config" / "finetune.py").write_text("import time\ninit_from = 'gpt2-xl'\ndataset = 'mine'\nmax_iters = 20\nlr_decay_iters = 20\n"
                                                 "decay_lr = False\nwandb_run_name = 'ft-' + str(time.time())\n")  # fmt: skip
    made = convert(Path("config/finetune.py"))
    found = values(made.text, here)
    assert found["data.path"] == "data/mine/input.txt"
    assert found["optim.lr_scheduler_type"] == "constant" and "[model]" not in made.text and "n_embd" not in made.text
    assert "It starts from openai-community/gpt2-xl" in made.text and any("wandb_run_name" in line for line in made.said)


def test_values_of_litgpt(here: Path) -> None:
    found = values(convert(Path("pretrain.yaml")).text, here)
    wanted = {"train.max_steps": 200, "optim.warmup_steps": 20, "train.global_batch_size": 8, "train.per_device_train_batch_size": 2,
              "log.logging_steps": 2, "eval.eval_rows": 8, "optim.adam_beta2": 0.99, "optim.learning_rate": 4e-4, "train.precision": "bf16",
              "data.path": "texts", "data.num_workers": 0, "model.hidden_size": 32, "model.tie_embeddings": True, "run.seed": 42}  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted


def test_a_name_of_litgpt_is_no_shape(here: Path) -> None:
    """No default model is trained unnoticed; tokens become steps, and that is said."""
    (here / "named.yaml").write_text("model_name: pythia-160m\ntrain: {global_batch_size: 8, micro_batch_size: 2, max_tokens: 1e6, max_seq_length: 64}\n"
                                     "data: {class_path: litgpt.data.TextFiles, init_args: {train_data_path: texts}}\n")  # fmt: skip
    made = convert(Path("named.yaml"))
    top, _, below = made.text.partition("\n[model]\n")
    assert "To be set before" in top and "model_name = 'pythia-160m'" in top
    assert any(line.startswith("to be set: model_name = 'pythia-160m'") for line in made.said)
    asked = [line for line in below.partition("\n\n")[0].splitlines() if line.startswith("# ")]
    assert [line.split()[1] for line in asked] == ["num_layers", "num_heads", "num_kv_heads", "hidden_size", "intermediate_size"]
    filled = made.text
    for line, number in zip(asked, (1, 4, 2, 32, 64), strict=True):
        filled = filled.replace(line, line.removeprefix("# ").replace("= ", f"= {number}", 1))
    found = values(filled, here)
    assert (found["model.num_layers"], found["model.num_kv_heads"], found["model.hidden_size"], found["train.max_steps"]) == (1, 2, 32, 1953)
    assert "assumed: train.max_steps = 1953: max_tokens 1000000 / (global_batch_size 8 x 64 tokens a row)" in made.said
    (here / "shaped.yaml").write_text("model_config: {n_layer: 1, n_head: 2, n_embd: 32, block_size: 128}\n"
                                      "train: {global_batch_size: 4, micro_batch_size: 2, max_tokens: 51200}\n")  # fmt: skip
    found = values(convert(Path("shaped.yaml")).text, here)
    assert found["train.max_steps"] == 100 and found["data.seq_len"] == 128


@pytest.mark.parametrize(("shape", "ours", "left"), [
    ({"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "n_query_groups": 1, "intermediate_size": 48, "rotary_percentage": 0.5, "bias": False,
      "vocab_size": 500, "padded_vocab_size": 512, "norm_qk": True},
     {"style": "llama", "num_kv_heads": 1, "intermediate_size": 48, "partial_rotary_factor": 0.5, "attention_bias": False, "qk_norm": True},
     {"vocab_size", "padded_vocab_size"}),
    ({"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "rotary_percentage": 0.25, "lm_head_bias": True, "gelu_approximate": "tanh", "bias": True},
     {"style": "gpt2", "activation": "gelu_tanh", "partial_rotary_factor": 1.0, "mlp_bias": True}, {"rotary_percentage", "lm_head_bias"}),
    ({"norm_class_name": "LayerNorm", "mlp_class_name": "LLaMAMLP", "attn_bias": True}, {"style": "gpt2", "mlp": "swiglu", "attention_bias": True, "mlp_bias": False},
     set()),
    ({"mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True, "n_expert": 0}, {"style": "llama", "gated_activation": "gelu_tanh"},
     {"scale_embeddings"}),
    ({"norm_class_name": "RMSNorm", "mlp_class_name": "GptNeoxMLP"}, {"style": "gpt2", "activation": "gelu"}, {"norm_class_name"}),
    ({"mlp_class_name": "LLaMAMoE", "n_expert": 8, "norm_class_name": "Norm"}, {"style": "llama"}, {"mlp_class_name", "n_expert", "norm_class_name"}),
])  # fmt: skip
def test_each_value_of_a_litgpt_shape_has_a_key_or_is_named(shape: dict[str, Any], ours: dict[str, Any], left: set[str], here: Path) -> None:
    table = {"model_config": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, **shape}, "train": {"micro_batch_size": 2, "max_steps": 5}}
    (here / "shape.yaml").write_text(json.dumps(table))
    made = convert(Path("shape.yaml"))
    found = recipe_of(made.text, here).tables()["model"]
    wanted = {"num_layers": 1, "num_heads": 2, "hidden_size": 32, "max_position_embeddings": 64, **ours}
    assert {key: value for key, value in wanted.items() if found.get(key, {"style": "llama", "partial_rotary_factor": 1.0}.get(key)) != value} == {}
    said = {line.split(": ")[1].split(" = ")[0] for line in made.said if line.startswith("no equivalent: ")}
    assert said == {f"model_config.{name}" for name in left}
    from treadle.models.base import build

    keys = {key: value for key, value in found.items() if key not in ("arch", "preset")}
    assert build("transformer", **keys).parameter_count() > 0


def test_litgpt_adapters(here: Path) -> None:
    (here / "lora.yaml").write_text(
        "checkpoint_dir: checkpoints/base\nprecision: bf16-true\nquantize: bnb.nf4\nlora_r: 8\nlora_alpha: 16\nlora_dropout: 0.05\n"
        "lora_query: true\nlora_value: true\nlora_mlp: false\nlora_head: true\ndata: {class_path: litgpt.data.JSON, init_args: "
        "{json_path: rows.jsonl, mask_prompt: true, val_split_fraction: 0.1}}\ntrain: {micro_batch_size: 1, lr_warmup_steps: 10, epochs: 2}\n"
    )
    made = convert(Path("lora.yaml"))
    found = values(made.text, here)
    assert found["adapter.lora_targets"] == ["query", "value"] and found["adapter.lora_rank"] == 8 and found["train.objective"] == "sft"
    assert found["data.train_on"] == "completion" and found["data.path"] == "rows.jsonl" and found["data.validation_fraction"] == 0.1
    assert "It starts from checkpoints/base" in made.text and "[model]" not in made.text
    assert {"quantize", "lora_head"} <= {line.split(": ")[1].split(" = ")[0] for line in made.said if line.startswith("no equivalent")}


def test_values_of_training_arguments(here: Path) -> None:
    found = values(convert(Path("arguments.json")).text, here)
    wanted = {"optim.min_lr_ratio": 0.2, "optim.lr_scheduler_type": "cosine", "optim.warmup_steps": 10, "optim.name": "adamw",
              "train.precision": "bf16", "log.logging_steps": 5, "eval.eval_steps": 5, "checkpoint.save_steps": None, "run.device": "cpu",
              "log.report_to": ["csv", "jsonl", "wandb"], "run.seed": 7, "optim.weight_decay": 0.0, "optim.adam_beta2": 0.999}  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    found = values(convert(Path("sft.py")).text, here)
    wanted = {"train.objective": "sft", "optim.learning_rate": 2e-5, "optim.lr_scheduler_type": "linear", "optim.min_lr_ratio": 0.0,
              "run.seed": 42, "data.seq_len": 512, "data.path": "conversations", "data.packing": "best_fit", "train.precision": "fp32", "log.report_to": []}  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize(("more", "kind"), [({"eval_strategy": "steps"}, "huggingface"), ({"lr_scheduler_type": "cosine"}, "huggingface"),
                                            ({"eval_strategy": "steps", "train": {"max_steps": 3}}, "recipe"), ({}, "recipe")])  # fmt: skip
def test_convert_and_train_take_the_same_tables_for_training_arguments(more: dict[str, Any], kind: str, here: Path) -> None:
    """What `treadle train` sends to convert, convert reads as such."""
    table = {"output_dir": "out", "learning_rate": 1e-4, "logging_steps": 5, **more}
    (here / "some.json").write_text(json.dumps({**table, "no_such_argument": 1}))
    with pytest.raises(ConfigError) as problem:
        compose([target_layer("some.json")])
    assert ("treadle convert" in str(problem.value)) == (kind == "huggingface")
    (here / "some.json").write_text(json.dumps(table))
    assert convert(Path("some.json")).kind == kind


def test_files_weights_and_folder_of_the_example_scripts(here: Path) -> None:
    """What transformers' run_clm.py and its like take beside TrainingArguments."""
    (here / "clm.json").write_text(json.dumps({
        "model_name_or_path": "openai-community/gpt2", "train_file": "texts/story.txt", "validation_file": "held.txt", "do_train": True,
        "overwrite_output_dir": True, "output_dir": "out", "per_device_train_batch_size": 2, "learning_rate": 1e-4, "logging_steps": 5}))  # fmt: skip
    made = convert(Path("clm.json"))
    found = values(made.text, here)
    assert found["data.path"] == "texts/story.txt" and found["data.validation_path"] == "held.txt" and "austen" not in made.text
    left = {line.split(": ")[1].split(" = ")[0]: line for line in made.said if line.startswith("no equivalent")}
    assert set(left) == {"model_name_or_path", "overwrite_output_dir"}
    assert "--from NAME" in left["model_name_or_path"] and "--fresh" in left["overwrite_output_dir"]
    assert "It starts from openai-community/gpt2" in made.text and "[model]" not in made.text  # no other model is trained unnoticed


def test_their_defaults_need_no_word(here: Path) -> None:
    """TrainingArguments as Trainer writes them today: nothing that is at its default is reported."""
    transformers = pytest.importorskip("transformers", reason="the extra hf (transformers) is not installed")
    (here / "all.json").write_text(transformers.TrainingArguments(output_dir="out").to_json_string())
    made = convert(Path("all.json"))
    assert made.kind == "huggingface" and not [line for line in made.said if line.startswith("no equivalent")]
    found = values(made.text, here)
    ours = {"train.per_device_train_batch_size": 8, "train.num_train_epochs": 3.0, "optim.learning_rate": 5e-5, "optim.adam_beta2": 0.999}
    assert {key: found[key] for key in ours} == ours


KEYS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {"d_model": st.sampled_from([32, 64]), "n_layers": st.integers(1, 3), "d_ff": st.sampled_from([64, 96]), "dropout": st.floats(0, 0.5),
              "activation": st.sampled_from(["gelu", "relu"]), "pre_norm": st.booleans(), "gradient_checkpointing": st.booleans(),
              "num_experts": st.just(4)},
    "training": {"batch_size": st.integers(1, 9), "lr": st.floats(1e-6, 1e-1), "use_amp": st.booleans(), "amp_dtype": st.just("bfloat16"),
                 "optimizer": st.sampled_from(["adamw", "muon"]), "early_stopping": st.booleans(), "use_wandb": st.booleans(),
                 "report_to": st.sampled_from(["none", "all", ["csv"]]), "max_steps": st.one_of(st.none(), st.integers(1, 99)),
                 "warmup_steps": st.integers(0, 9), "use_ddp": st.booleans()},
    "data": {"data_path": st.sampled_from(["texts", "a b.txt", 'q"uote.txt']), "max_length": st.integers(2, 99), "pack_sequences": st.booleans(),
             "packing_strategy": st.sampled_from(["greedy", "best_fit"]), "validation_split": st.sampled_from([0.2, "held.txt"])},
    "output": {"checkpoint_dir": st.text("ab/", min_size=1, max_size=4), "log_dir": st.just("logs")},
}  # fmt: skip
TABLES = st.fixed_dictionaries({}, optional={s: st.fixed_dictionaries({}, optional=k) for s, k in KEYS.items()})  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(table=TABLES)
def test_a_converted_recipe_is_the_file(table: dict[str, Any], tmp_path: Path) -> None:
    """Where `treadle train FILE` takes a file, its recipe says the same; what it refuses is left out."""
    path = tmp_path / "any.json"
    path.write_text(json.dumps(table))
    try:
        direct = compose([target_layer(str(path))])
    except ConfigError as problem:
        if "given twice" in str(problem) or "num_experts" not in table.get("model", {}):
            return  # a contradiction
        assert any("num_experts" in line for line in convert(path).said)
        return
    made = convert(path)
    again = recipe_of(made.text, tmp_path).tables()
    if direct.data.path is None:
        again["data"]["path"] = None  # the text that stands in
    assert again == direct.tables()
    assert not [line for line in made.said if line.startswith("no equivalent")]


@pytest.mark.parametrize("name", ["experiment.json", "config.json"])
def test_convert_then_train_is_train(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same losses, to the last digit, as the file itself."""
    small = ("--eval_rows", "2", "--sample_tokens", "0", "--logging_steps", "1", "--eval.at_end", "false")
    losses = []
    app(["convert", name, "--output", "made.toml"], prog_name="treadle", standalone_mode=False)
    for number, target in enumerate((name, "made.toml")):
        places = ("--output_dir", f"runs/{number}", "--log_dir", f"logs{number}", "--checkpoint_dir", f"kept{number}", "--report_to", "csv")
        app(["train", target, *places, *small], prog_name="treadle", standalone_mode=False)
        rows = list(csv.DictReader((here / f"logs{number}" / "training_log.csv").open()))
        losses.append([(row["step"], row["train/loss"] if "train/loss" in row else row["loss"]) for row in rows])
    capsys.readouterr()
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_script_is_never_run(here: Path) -> None:
    (here / "evil.py").write_text("import pathlib\nBATCH_SIZE = 4\npathlib.Path('touched').write_text('x')\n"
                                  "LEARNING_RATE = __import__('os').mkdir('made') or 1e-3\nSTEPS = 9 ** 9 ** 9\nSEED = 1 / 0\nEPOCHS = somewhere\n")  # fmt: skip
    made = convert(Path("evil.py"))
    assert not (here / "touched").exists() and not (here / "made").exists()
    assert recipe_of(made.text, here).train.per_device_train_batch_size == 4
    assert {line.split(": ")[1] for line in made.said if "is computed when the script runs" in line} == {"LEARNING_RATE", "STEPS", "SEED", "EPOCHS"}


def test_a_recipe_holds_what_the_file_says_alone(here: Path) -> None:
    """What a preset recommends comes anew with it."""
    (here / "big.py").write_text("MODEL_SIZE = '3b'\nSTEPS = 4\n")
    text = convert(Path("big.py")).text
    assert 'preset = "3b"' in text and "global_batch_size" not in text and "learning_rate" not in text
    assert recipe_of(text, here).train.global_batch_size == 1024


@pytest.mark.parametrize(
    ("name", "text", "warmup"),
    [
        ("a.json", '{"warmup_ratio": 0.1, "steps": 200, "batch_size": 2}', 20),
        ("a.py", "WARMUP_RATIO = 0.05\nMAX_STEPS = 100\n", 5),
        ("a.json", '{"warmup_ratio": 0.1, "steps": 200, "warmup_steps": 7}', 7),  # said in steps already
        ("b.py", "from transformers import TrainingArguments\na = TrainingArguments(max_steps=50, warmup_ratio=0.1)\n", 5),
        ("b.py", "from transformers import TrainingArguments\na = TrainingArguments(max_steps=50, warmup_ratio=0.1, lr_scheduler_type='constant')\n", 0),
        ("a.json", '{"warmup_ratio": 0.1, "batch_size": 2}', None),  # of what?
    ],
)
def test_a_share_of_the_steps_to_warm_up(name: str, text: str, warmup: int | None, in_folder: Path) -> None:
    (in_folder / name).write_text(text)
    made = convert(Path(name))
    assert values(made.text, in_folder)["optim.warmup_steps"] == warmup
    assert any("warmup_ratio" in line for line in made.said) == (warmup in (None, 7))


def test_constants_flags_and_classes(here: Path) -> None:
    (here / "x.py").write_text(
        "import argparse\nfrom dataclasses import dataclass\nimport torch\nA = 2\nRATE = -A * 1.5 + 10 % 3\nDTYPE = torch.bfloat16\nSIZES = [A, (A + 1)]\n"
        "OFF = not True\nTEXT = 'a' + 'b'\n_HIDDEN = 1\nmodel = object()\n"
        "@dataclass\nclass TrainingArguments:\n    max_steps: int = A * 5\n    learning_rate: float = 3e-4\n"
        "p = argparse.ArgumentParser()\np.add_argument('-b', '--batch-size', type=int, default=A ** 3)\np.add_argument('name')\n"
    )
    script = read_script(Path("x.py"))
    assert script.constants == {"A": 2, "RATE": -2.0, "DTYPE": "bfloat16", "SIZES": [2, 3], "OFF": False, "TEXT": "ab"}
    assert script.arguments == {"TrainingArguments": {"max_steps": 10, "learning_rate": 3e-4}} and script.flags == {"batch_size": 8}
    assert script.used == {"A"} and not script.computed


@pytest.mark.parametrize(
    ("name", "text", "kind", "message"),
    [
        ("gone.json", None, None, "does not exist"),
        ("a.py", "BATCH_SIZE = 4\n", "nanogtp", "did you mean 'nanogpt'"),
        ("a.py", "BATCH_SIZE = (\n", None, "is not valid Python"),
        ("a.py", "import treadle\nSTEPS = 4\n", None, "train it as it stands: treadle train a.py"),
        ("a.py", "print('hello')\n", None, "sets no constants"),
        ("a.py", "STEPS = 4\n", "litgpt", "is read from .yaml, and a.py is a script"),
        ("a.yaml", "steps: 4\n", "nanogpt", "is read from .py, and a.yaml is a table"),
        ("a.yaml", "steps: [4\n", None, "is not valid yaml"),
        ("a.yaml", "train: {micro_batch_size: 2, max_tokens: many}\n", None, "takes a number of tokens"),
        ("a.py", "(" * 5000 + ")" * 5000, None, "a.py"),
    ],
)
def test_refusals(name: str, text: str | None, kind: str | None, message: str, in_folder: Path) -> None:
    if text is not None:
        (in_folder / name).write_text(text)
    with pytest.raises((ConfigError, InputError)) as problem:
        convert(Path(name), kind)
    assert message in str(problem.value) and problem.value.exit_code == 2


def test_nothing_is_written_over(here: Path) -> None:
    made = convert(Path("config.json"))
    write(made, Path("out/made.toml"))
    write(made, Path("out/made.toml"))  # the same again
    Path("out/made.toml").write_text("# mine\n")
    with pytest.raises(ConfigError, match="give --output another name"):
        write(made, Path("out/made.toml"))
    assert Path("out/made.toml").read_text() == "# mine\n"


def test_a_recipe_that_cannot_be_written_leaves_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half of one that the next command would take for somebody else's."""

    def full(path: Path, to: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write(convert(Path("config.json")), Path("made.toml"))
    assert not Path("made.toml").exists()


def test_the_recipe_goes_to_standard_output(here: Path) -> None:
    """Alone, so that it can be piped; what there is to say goes to standard error. The same text every time."""
    out = treadle("convert", "arguments.json", cwd=here)
    again = treadle("convert", "arguments.json", cwd=here, PYTHONHASHSEED="7")
    assert out.returncode == 0 and out.stdout == again.stdout and "no equivalent: push_to_hub" in out.stderr
    assert recipe_of(out.stdout, here).train.max_steps == 100


def test_every_kind_has_a_file() -> None:
    assert {kind for kind, _ in FILES.values()} == set(KINDS) - {"recipe"}


def test_reading_needs_no_other_trainer() -> None:
    """Nothing of transformers or litgpt is imported to read their files."""
    source = "".join(path.read_text() for path in Path(sys.modules["treadle.convert"].__file__ or "").parent.glob("*.py"))
    assert not re.search(r"^\s*(?:import|from) (?:transformers|litgpt)\b", source, flags=re.M)
