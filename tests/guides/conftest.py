"""What a user of another guide types, in this process: a command line, as words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import make_text
from treadle.cli import app

SMALL = ("--batch_size", 2, "--sample_tokens", 2, "--eval_rows", 2, "--logging_steps", 1)


@pytest.fixture()
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `treadle WORDS` and returns what it printed; its errors are raised."""

    def run(*words: object) -> str:
        capsys.readouterr()
        app([str(word) for word in words], prog_name="treadle", standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text, as --data_dir names one."""
    folder = tmp_path_factory.mktemp("guide") / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(make_text(60, seed=number), encoding="utf-8")
    return folder
