"""The lists of verbs: every line is whole on a terminal of 80 columns, so a newcomer reads what each verb does."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from treadle.cli import app


@pytest.mark.parametrize(
    "group", [[], ["data"], ["tokenizer"], ["collatz"]], ids=lambda words: " ".join(words) or "treadle"
)
def test_no_line_of_a_list_of_verbs_is_cut(group: list[str]) -> None:
    result = CliRunner().invoke(app, [*group, "--help"], terminal_width=80)
    assert result.exit_code == 0
    lines = result.output.split("Commands:")[1].strip().splitlines()
    assert len(lines) >= 2
    for line in lines:
        name, _, said = line.strip().partition(" ")
        assert said.strip().endswith("."), f"{name}: {said}"
        assert not said.endswith(".."), f"the first sentence of {name}'s help is too long for its line: {said}"


def test_each_recipe_is_told_by_one_whole_sentence() -> None:
    lines = CliRunner().invoke(app, ["recipes"]).output.splitlines()[:-1]
    assert len(lines) >= 17
    for line in lines:
        name, _, said = line.partition(" ")
        assert said.strip().endswith((".", "--from RUN")), f"{name}: {said.strip()}"
