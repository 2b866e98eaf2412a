"""What users of five other trainers type, row by row, and the test that proves it: file -> tests in this folder, or elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROWS: dict[str, list[str]] = {
    "bytes: an experiment.json trains, evaluates, samples and sums up": ["guides/test_bytes.py::test_an_experiment_file_runs"],
    "bytes: names of architectures; --model_config, --config, --train_config": [
        "guides/test_bytes.py::test_names_of_architectures", "guides/test_bytes.py::test_a_model_file_alone",
        "guides/test_bytes.py::test_config_and_train_config_name_recipes",
    ],
    "bytes: byte architectures imply the byte tokenizer": ["guides/test_bytes.py::test_byte_architectures_read_bytes"],
    "bytes: eval and generate, both spellings of every flag": [
        "guides/test_bytes.py::test_eval_takes_the_guides_flags", "guides/test_bytes.py::test_generate_takes_the_guides_flags",
    ],
    "bytes: --resume_from alone continues that run": ["guides/test_bytes.py::test_resume_from_alone_continues_its_run"],
    "bytes: prepare's flags": ["guides/test_bytes.py::test_prepare_takes_the_guides_flags"],
    "shc: its flags; switches add to report_to": ["guides/test_shc.py::test_its_flags", "guides/test_shc.py::test_switches_add_to_a_list"],
    "shc: values by scale, printed": ["guides/test_shc.py::test_values_by_scale"],
    "framework: load, train, presets without weights": [
        "guides/test_framework.py::test_load_and_train", "guides/test_framework.py::test_a_preset_is_a_shape",
    ],
    "framework: helpers give numbers and objects": [
        "guides/test_framework.py::test_recommended_config", "guides/test_framework.py::test_estimated_memory",
        "guides/test_framework.py::test_counts_and_sizes", "guides/test_framework.py::test_a_loop_by_hand",
        "guides/test_framework.py::test_a_plan_of_a_dictionary",
    ],
    "framework: streams, pipelines, dynamics, attention, O(N) models": [
        "guides/test_framework.py::test_streams_and_pipelines", "guides/test_framework.py::test_its_architectures",
    ],
    "llm trainer: config.json, torchrun, resume": [
        "guides/test_llm_trainer.py::test_every_key_means_what_it_says", "guides/test_llm_trainer.py::test_other_values_of_its_keys",
        "guides/test_llm_trainer.py::test_its_config_trains", "guides/test_llm_trainer.py::test_torchrun_with_its_config",
    ],
    "llm trainer: a DeepSpeed file is honoured and checked": ["guides/test_llm_trainer.py::test_a_deepspeed_file_is_honoured_and_checked"],
    "llm trainer: a Trainer subclass logs metrics of its own": ["guides/test_framework.py::test_a_trainer_with_metrics_of_its_own"],
    "llm trainer: best_model, best.pt, step_5000.pt": ["guides/test_bytes.py::test_other_trainers_names_of_checkpoints"],
    "collatz: constants are keys, upper case included": ["guides/test_collatz.py::test_the_constants_of_the_script"],
    "messages: three near names at most, and where the list is": ["guides/test_messages.py::test_an_unknown_key"],
    "messages: JSON, YAML and TOML behave alike": ["guides/test_bytes.py::test_the_same_file_in_three_formats"],
    "messages: two spellings conflict only where they differ": ["guides/test_messages.py::test_two_spellings_conflict_only_where_they_differ"],
    "every code block of the guides is executed": [
        "guides/test_coming_from.py::test_its_commands_run", "house/test_documents.py::test_python_blocks_run", "guides/test_commands.py::test_its_commands_run",
    ],
    "every kind of file becomes a recipe": ["convert/test_convert.py::test_a_recipe_that_check_accepts"],
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_the_row_has_its_tests(row: str) -> None:
    for place in ROWS[row]:
        file, _, name = place.partition("::")
        names = {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in names, f"{row}: {place} is gone"
