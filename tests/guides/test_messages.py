"""What a word that has no meaning here is answered: three near names at most, and where all of them are."""

from __future__ import annotations

import re
from typing import Any

import pytest

from treadle.errors import ConfigError
from treadle.recipe import Layer, compose


@pytest.mark.parametrize(
    ("table", "near", "place"),
    [
        ({"lerning_rate": 1}, "learning_rate", "treadle train --help all"),
        ({"train": {"max_stepz": 1}}, "max_steps", "treadle train --help train"),
        ({"training": {"zzz": 1}}, "none is like it", "treadle train --help train"),
        ({"zzzzzz": 1}, "none is like it", "treadle train --help all"),
        ({"model": {"hiden_size": 1}}, "hidden_size", "treadle train --model.arch transformer --help model"),
        ({"model": {"arch": "hnet", "zzzz": 1}}, "none is like it", "treadle train --model.arch hnet --help model"),
    ],
)
def test_an_unknown_key(table: dict[str, Any], near: str, place: str) -> None:
    for from_text in (False, True):
        with pytest.raises(ConfigError) as problem:
            compose([Layer(table, "config.json", from_text)])
        said = str(problem.value)
        assert said.startswith("config.json") and "unknown key" in said and near in said and place in said
        assert len(re.findall(r"'\w+'", said.partition("did you mean")[2])) <= 3 and "\n" not in said and len(said) < 220


def test_a_key_in_another_section_is_understood_and_said() -> None:
    recipe = compose([Layer({"data": {"batch_size": 4}, "model": {"seq_len": 64}, "training": {"data_path": "a.txt"}}, "config.json")])
    assert (recipe.train.per_device_train_batch_size, recipe.data.seq_len, recipe.data.path) == (4, 64, "a.txt")
    assert any("data.batch_size belongs to [train]" in note for note in recipe.notes)


def test_two_spellings_conflict_only_where_they_differ() -> None:
    assert compose([Layer({"lr": 1e-3, "learning_rate": 1e-3}, "x")]).optim.learning_rate == 1e-3
    with pytest.raises(ConfigError, match=r"optim.learning_rate is given twice with different values: .*keep one"):
        compose([Layer({"lr": 1e-3, "learning_rate": 2e-3}, "x")])
