"""Configuration: one vocabulary, strict types, clear errors, and a resolved file that runs again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import treadle
from treadle.dry_run import check
from treadle.errors import ConfigError
from treadle.help import section_lines
from treadle.monitor.settings import DEFAULT_SINKS, FILE_SINKS, Sink
from treadle.monitor.sinks import SINKS
from treadle.recipe import Layer, builtin_recipes, compose, target_layer
from treadle.settings import dump_toml, load_table, parse_flags
from treadle.start import Request, configure
from treadle.training.config import SECTIONS, Recipe
from treadle.training.optim import OPTIMIZERS
from treadle.training.settings import Optimizer


def of(table: dict[str, Any], from_text: bool = False, with_model: bool = False) -> Recipe:
    return compose([Layer(table, "test", from_text)], with_model)


def test_names_that_a_key_takes_are_those_that_there_are() -> None:
    """Written twice because neither may import the other: a settings class needs no torch, and a registry says where things are."""
    assert set(get_args(Optimizer)) == set(OPTIMIZERS.names()) and set(get_args(Sink)) == set(SINKS.names())
    assert set(FILE_SINKS) < set(DEFAULT_SINKS) < set(get_args(Sink))


# One vocabulary for every guide: (what is written) -> (where it lands, value).
ALIASES = [
    ({"save_dir": "x"}, "checkpoint.checkpoint_dir", "x"),
    ({"experiment_name": "x"}, "run.run_name", "x"),
    ({"lr": 0.5}, "optim.learning_rate", 0.5),
    ({"optimizer": "muon"}, "optim.name", "muon"),
    ({"steps": 7}, "train.max_steps", 7),
    ({"num_epochs": 2}, "train.num_train_epochs", 2.0),
    ({"lr_scheduler": "linear"}, "optim.lr_scheduler_type", "linear"),
    ({"scheduler": "WSD"}, "optim.lr_scheduler_type", "wsd"),
    ({"eta_min": 1e-5}, "optim.min_lr", 1e-5),
    ({"batch_size": 3}, "train.per_device_train_batch_size", 3),
    ({"mixed_precision": "BFloat16"}, "train.precision", "bf16"),
    ({"mixed_precision": "none"}, "train.precision", "fp32"),
    ({"fp16": True}, "train.precision", "fp16"),
    ({"use_amp": True}, "train.precision", "auto"),
    ({"use_amp": True, "amp_dtype": "float16"}, "train.precision", "fp16"),
    ({"use_gradient_checkpointing": True}, "train.gradient_checkpointing", True),
    ({"gradient_checkpointing": "every_3"}, "train.gradient_checkpointing", 3),
    ({"compile_model": True}, "train.torch_compile", True),
    ({"log_steps": 5}, "log.logging_steps", 5),
    ({"eval_interval": 5}, "eval.eval_steps", 5),
    ({"SAVE_EVERY": 5}, "checkpoint.save_steps", 5),
    ({"resume_from": "x"}, "checkpoint.resume_from_checkpoint", "x"),
    ({"use_wandb": True}, "log.report_to", ["csv", "jsonl", "tensorboard", "wandb"]),
    ({"use_tensorboard": False}, "log.report_to", ["csv", "jsonl"]),
    ({"wandb_project": "p"}, "log.project", "p"),
    ({"max_seq_length": 99}, "data.seq_len", 99),
    ({"data_dir": "d"}, "data.path", "d"),
    ({"validation_split": 0.2}, "data.validation_fraction", 0.2),
    ({"preprocessing_num_workers": 2}, "data.preparation_workers", 2),
    ({"packing_strategy": "greedy"}, "data.packing", "next_fit"),
    ({"pack_sequences": False}, "data.packing", "none"),
    ({"early_stopping": {"patience": 3, "threshold": 0.1}}, "eval.early_stopping_patience", 3),
    ({"training": {"learning-rate": 0.25}}, "optim.learning_rate", 0.25),
    ({"optim": "muon"}, "optim.name", "muon"),
    ({"max_iters": 7}, "train.max_steps", 7),
    ({"early_stopping.patience": 2}, "eval.early_stopping_patience", 2),
]


@pytest.mark.parametrize(("table", "key", "value"), ALIASES, ids=lambda v: str(v)[:40])
def test_other_words_are_understood(table: dict, key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    assert getattr(of(table).section(section), name) == value


def test_aliases_leave_a_note_and_canonical_names_do_not() -> None:
    assert any("lr is read as optim.learning_rate" in note for note in of({"lr": 0.1}).notes)
    assert of({"learning_rate": 0.1, "optim.weight_decay": 0.0}).notes == []


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"lr": 0.1, "learning_rate": 0.2}, "given twice"),
        ({"bf16": True, "fp16": True}, "given twice"),
        ({"name": "x"}, "tokenizer.name or optim.name"),
        ({"nowhere.key": 1}, "unknown section"),
        ({"train.max_step": 1}, "max_steps"),
        ({"max_steps": True}, "valid integer"),
        ({"max_steps": "ten"}, "valid integer"),
        ({"eval": {"max_iters": 7}}, "eval.max_iters"),  # litgpt's, and not the steps of training
        ({"learning_rate": "fast"}, "valid number"),
        ({"report_to": ["csv", "excel"]}, "csv"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_patience"),
        ({"model": {"hiden": 1}}, None),  # open until the architecture is known
    ],
    ids=lambda v: str(v)[:40],
)
def test_errors_say_what_is_wrong(table: dict, says: str | None) -> None:
    if says is None:
        with pytest.raises(ConfigError, match="hidden_size"):
            of(table, with_model=True)
        return
    with pytest.raises(ConfigError) as caught:
        of(table)
    assert says in str(caught.value)


def test_same_alias_and_name_with_equal_values_is_fine() -> None:
    assert of({"lr": 0.1, "learning_rate": 0.1}).optim.learning_rate == 0.1


def test_text_values_are_read_by_tomls_grammar() -> None:
    assert of({"decay_fraction": ".5"}, from_text=True).optim.decay_fraction == 0.5
    recipe = of({"learning_rate": "3e-4", "report_to": "csv,jsonl", "shuffle": "false", "run_name": "123",
                 "gradient_checkpointing": "[0, 2]", "warmup_steps": "none"}, from_text=True)  # fmt: skip
    assert recipe.optim.learning_rate == 3e-4 and recipe.log.report_to == ["csv", "jsonl"]
    assert recipe.data.shuffle is False and recipe.run.run_name == "123"
    assert recipe.train.gradient_checkpointing == [0, 2] and recipe.optim.warmup_steps is None


def test_flags_win_over_file_and_presets_win_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('[model]\npreset = "tiny"\nnum_layers = 3\n[train]\nmax_steps = 5\nbatch_size = 2\n')
    recipe = compose([target_layer(str(file)), Layer({"max_steps": "7"}, "flag", True)])
    assert recipe.train.max_steps == 7 and recipe.train.per_device_train_batch_size == 2
    assert recipe.optim.learning_rate == 6e-4  # recommended for the preset
    assert recipe.origins["train.max_steps"] == "flag" and recipe.run.run_name == "r"
    assert "recommended" in recipe.origins["optim.learning_rate"]
    assert recipe.preset == "tiny" and recipe.model == {"num_layers": 3}


def test_what_is_recommended_with_an_optimiser_goes_with_it() -> None:
    def optim(**flags: str) -> tuple[str, float]:
        found = compose([Layer({"preset": "nano", **flags}, "flag", True)]).optim
        return found.name, found.learning_rate

    assert optim() == optim(**{"optim.name": "NorMuon"}) == ("normuon", 8e-3)
    assert optim(learning_rate="2e-3") == ("normuon", 2e-3)
    assert optim(**{"optim.name": "adamw"}) == ("adamw", 1e-3) and optim(**{"optim.name": "muon", "lr": "2e-2"}) == ("muon", 2e-2)
    assert optim(**{"parallel.deepspeed": "none"}) == ("normuon", 8e-3)
    for other in ({"arch": "inl"}, {"parallel": "deepspeed"}, {"shard_optimizer": "true"}, {"distill.teacher": "runs/t"}):
        assert optim(**other) == ("adamw", 1e-3), other
    of_a_run = Layer({"model": {"arch": "transformer", "preset": "nano"}}, "the model of runs/a", trained=True)
    assert compose([of_a_run]).optim.name == "adamw"  # fine-tuning was not measured


@pytest.mark.parametrize("keys", [{}, {"optim.name": "adamw"}, {"learning_rate": 1e-3}, {"optim.name": "adamw", "learning_rate": 8e-3}], ids=str)
def test_a_configuration_given_from_python_is_the_one_that_runs(keys: dict[str, Any]) -> None:
    """Also where a value is a section's default and the preset recommends another."""
    config = treadle.TrainConfig(preset="nano", **keys)
    again = compose([target_layer(config.set_values())])
    assert again.optim == config.optim and (again.optim.name == "normuon") == ("optim.name" not in keys)


@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
def test_one_recipe_in_three_formats(tmp_path: Path, suffix: str) -> None:
    text = {
        "toml": "[train]\nmax_steps = 4\n[optim]\nlearning_rate = 3e-4\n[model]\nd_model = 64\n",
        "yaml": "train:\n  max_steps: 4\noptim:\n  learning_rate: 3e-4\nmodel:\n  d_model: 64\n",
        "json": json.dumps({"train": {"max_steps": 4}, "optim": {"learning_rate": 3e-4}, "model": {"d_model": 64}}),
    }[suffix]
    path = tmp_path / f"r.{suffix}"
    path.write_text(text)
    recipe = compose([target_layer(str(path))])
    assert recipe.train.max_steps == 4 and recipe.optim.learning_rate == 3e-4 and recipe.model["hidden_size"] == 64


def test_an_experiment_json_runs_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "transformer", "n_embd": 64, "n_head": 2}))
    (tmp_path / "e.json").write_text(json.dumps({
        "experiment_name": "first", "model": {"config_file": str(tmp_path / "model.json"), "type": "transformer"},
        "data": {"data_dir": "austen", "max_seq_length": 64},
        "training": {"batch_size": 2, "learning_rate": 0.001, "scheduler": "cosine", "mixed_precision": "bf16"},
        "output": {"checkpoint_dir": "ck", "log_dir": "lg"},
    }))  # fmt: skip
    recipe = compose([target_layer(str(tmp_path / "e.json"))])
    assert recipe.run.run_name == "first" and recipe.model == {"hidden_size": 64, "num_heads": 2}
    assert recipe.checkpoint.checkpoint_dir == "ck" and recipe.log.log_dir == "lg"
    assert recipe.train.precision == "bf16" and recipe.data.seq_len == 64 and recipe.eval.at_end


def test_a_broken_file_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[train\nmax_steps = 1\n")
    with pytest.raises(ConfigError, match=r"broken.toml is not valid toml.*line 1"):
        load_table(path)


def test_the_resolved_configuration_runs_again(tmp_path: Path) -> None:
    recipe = of({"lr": 0.01, "report_to": ["csv"], "loss_weights": {"ratio": 0.5}, "data.path": 'odd "name"\n.txt',
                 "hidden_size": 64, "max_steps": 9}, with_model=True)  # fmt: skip
    (tmp_path / "c.toml").write_text(recipe.to_toml())
    again = compose([Layer(load_table(tmp_path / "c.toml"), "c.toml")])
    assert again.tables() == recipe.tables()


@pytest.mark.parametrize("name", list(builtin_recipes()))
def test_every_built_in_recipe_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe is composed, built and run for real: two steps of two rows, written nowhere but here."""
    from treadle.monitor.console import Console
    from treadle.start import train

    monkeypatch.chdir(tmp_path)
    shorter = {"max_steps": "2", "per_device_train_batch_size": "2", "eval_rows": "2", "sample_tokens": "2", "report_to": "jsonl"}
    assert train(Request(name, shorter), Console(quiet=True))["step"] == 2
    assert (tmp_path / "runs" / name / "metrics.jsonl").is_file()


def test_check_says_where_each_value_comes_from(
    text_file: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import TINY

    found = check(Request(str(text_file), {**TINY, "max_steps": "3"}))
    out = capsys.readouterr().out
    assert (
        "train.max_steps = 3    (flag)" in out and "optim.weight_decay = 0.1    (default)" in out and "It works" in out
    )
    assert found["loss"] > 0 and found["max_steps"] == 3 and not (in_folder / "runs").exists()


def test_help_is_the_sections_documentation() -> None:
    lines = "\n".join(section_lines("optim", SECTIONS["optim"]))
    assert "--optim.learning_rate  (float, default 0.001)" in lines and "Peak learning rate. Also: lr." in lines
    assert "cosine | linear | wsd | constant" in lines


@pytest.mark.parametrize("text", ["True", "TRUE", "true", "False", "false"])
def test_true_and_false_are_booleans_in_any_case(text: str) -> None:
    recipe = of({"bf16": text, "compile": text, "shuffle": text}, from_text=True)
    said = text.lower() == "true"
    assert (recipe.train.precision, recipe.train.torch_compile, recipe.data.shuffle) == ("bf16" if said else "auto", said, said)


@pytest.mark.parametrize("key", ["bf16", "compile", "shuffle"])
def test_a_bad_boolean_is_told_what_is_allowed(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*'maybe'.*\(allowed: .*true, false\)"):
        of({key: "maybe"}, from_text=True)


def test_flags_are_parsed() -> None:
    assert parse_flags(["x.toml", "--a.b", "1", "--c=2", "--flag", "--d", "-3"]) == (
        ["x.toml"], {"a.b": "1", "c": "2", "flag": "true", "d": "-3"}
    )  # fmt: skip
    with pytest.raises(ConfigError, match="twice"):
        parse_flags(["--a", "1", "--a", "2"])


def test_flags_of_other_trainers_that_say_nothing_leave_a_note_each() -> None:
    recipe = of(parse_flags(["--do_train", "--do_eval", "True", "--overwrite_output_dir"])[1], from_text=True)
    assert [next(word for word in ("treadle train", "eval.eval_steps", "--fresh") if word in note) for note in recipe.notes] == [
        "treadle train", "eval.eval_steps", "--fresh"]  # fmt: skip
    assert recipe.tables() == of({}).tables()


def test_a_flag_without_its_value_is_told_so_unless_it_is_a_switch() -> None:
    for flag, key in (("max_steps", "max_steps"), ("run.run_name", "run_name"), ("data-path", "path"), ("hidden_size", "hidden_size")):
        with pytest.raises(ConfigError, match=f"^--{flag} needs a value$"):
            of(parse_flags([f"--{flag}", "--seed", "3"])[1], from_text=True, with_model=key == "hidden_size")
    assert of(parse_flags(["--bf16", "--compile"])[1], from_text=True).train.torch_compile is True


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.lists(st.integers(), max_size=3)
)
words = st.one_of(
    st.sampled_from([n for s, c in SECTIONS.items() for k in c.model_fields for n in (k, f"{s}.{k}")]),
    st.text(max_size=20),
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(words, values, max_size=4), st.booleans())
def test_any_configuration_works_or_is_a_config_error(table: dict, from_text: bool) -> None:
    if from_text:
        table = {k: str(v) for k, v in table.items()}
    try:
        recipe = of(table, from_text)
    except ConfigError as problem:
        assert str(problem)
        return
    for section, cls in SECTIONS.items():
        cls(**recipe.section(section).model_dump())  # what was accepted is valid


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.one_of(
    st.booleans(), st.integers(-2**62, 2**62), st.floats(allow_nan=False), st.text(), st.lists(st.text(), max_size=3)
), max_size=5))  # fmt: skip
def test_written_toml_reads_back(table: dict) -> None:
    import tomllib

    assert tomllib.loads(dump_toml({"section": table})) == {"section": table}


def test_both_decays_in_one_word() -> None:
    """As torch.optim and DeepSpeed write them."""
    for written in ("[0.9, 0.98]", "0.9,0.98", "(0.9, 0.98)"):
        optim = compose([Layer({"optim.betas": written}, "flag", from_text=True)]).optim
        assert (optim.adam_beta1, optim.adam_beta2) == (0.9, 0.98)
    for bad in ([0.9], 0.9, "a,b"):
        with pytest.raises(ConfigError, match="betas = "):
            compose([Layer({"optim": {"betas": bad}}, "recipe.toml")])


def test_a_name_beside_a_folder_says_what_it_names(tmp_path: Path) -> None:
    """run_name is no folder where a file says one; Hugging Face's Trainer has it so too."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'run.output_dir = "{tmp_path / "out"}"\n')
    told = configure(Request(str(recipe), {"run_name": "second"}), tmp_path / "out")
    assert told.run.run_name == "second" and any("its folder is" in note and "recipe.toml" in note for note in told.notes)
    for flags in ({}, {"run_name": "out"}, {"run_name": "second", "output_dir": str(tmp_path / "out")}):
        assert not any("its folder is" in note for note in configure(Request(str(recipe), flags), tmp_path / "out").notes)
