"""`treadle sweep`: a grid of ordinary runs, resumed, reported, and refused where it is none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import flags, treadle
from treadle.cli import app
from treadle.errors import ConfigError
from treadle.sweep import Cell, Sweep, grid, lines_of

SMALL = flags(max_steps=4, eval_steps=4, save_steps=4, hidden_size=16, num_layers=1, num_heads=2, seq_len=32,
              batch_size=2, **{"tokenizer.name": "byte"})  # fmt: skip


def test_a_grid_runs_and_the_same_command_repeats_nothing(text_file: Path, tmp_path: Path) -> None:
    line = ("sweep", text_file, "--over", "optim.learning_rate=1e-3,3e-2", "--seeds", 2, "--processes", 2, "--output_dir",
            tmp_path / "grid", *SMALL)  # fmt: skip
    first = treadle(*line)
    assert first.returncode == 0, first.stderr
    cells = json.loads((tmp_path / "grid" / "sweep.json").read_text())["cells"]
    assert [(c["point"]["optim.learning_rate"], c["seed"]) for c in cells] == [("1e-3", 0), ("3e-2", 0), ("1e-3", 1), ("3e-2", 1)]
    assert len({c["value"] for c in cells}) == 4 and all(c["step"] == 4 for c in cells)
    logs = {c["folder"]: (Path(c["folder"]) / "training_log.csv").read_bytes() for c in cells}
    again = treadle(*line)
    assert again.stdout.splitlines()[-3:] == first.stdout.splitlines()[-3:]
    assert all((Path(folder) / "training_log.csv").read_bytes() == log for folder, log in logs.items())
    assert all(c["metric"] == "bpb" and c["lower_is_better"] is True and c["cpu_seconds"] > 0 for c in cells)
    drawn = ElementTree.parse(tmp_path / "grid" / "sweep.svg").getroot()
    assert {"optim.learning_rate=1e-3", "optim.learning_rate=3e-2"} < {element.text for element in drawn.iter()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_leaves_saved_runs_and_no_process(number: int, text_file: Path, tmp_path: Path) -> None:
    keys = flags(max_steps=100_000, hidden_size=16, num_layers=1, num_heads=2, seq_len=32, **{"tokenizer.name": "byte"})
    line = ["sweep", str(text_file), "--over", "lr=1e-3,3e-3", "--processes", "2", "--output_dir", str(tmp_path / "grid")]
    child = subprocess.Popen([sys.executable, "-m", "treadle", *line, *map(str, keys)], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 90
        while len([o for o in tmp_path.glob("grid/*/sweep.out") if "step 10/" in o.read_text()]) < 2:
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.1)
        child.send_signal(number)
        assert child.wait(90) == 128 + number
    finally:
        child.kill()
    ended = [o.read_text().splitlines()[-1] for o in tmp_path.glob("grid/*/sweep.out")]
    assert len(ended) == 2 and all("saved. The same command continues." in line for line in ended)


@pytest.mark.parametrize(
    "over, words",
    [
        ("optim.learning_rat=1e-3,3e-3", "optim.learning_rat=1e-3: "), ("learning_rate=1e-3,-1", "learning_rate=-1: "),
        ("learning_rate=1e-3,abc", "valid number"), ("optim.name=adamw,lion", "optim.name=lion: "),
        ("hidden_size=16,64", "hidden_size=64: --hidden_size is given twice"), ("num_kv_heads=1,3", "num_kv_heads=3: "),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_refused_end_it_before_the_first_run(over: str, words: str, text_file: Path, tmp_path: Path) -> None:
    """With the error that the run would give, after the cell's name."""
    with pytest.raises(ConfigError) as caught:
        app(["sweep", str(text_file), "--over", over, "--output", str(tmp_path / "grid"), *SMALL], prog_name="treadle", standalone_mode=False)
    assert words in str(caught.value) and not (tmp_path / "grid").exists()


@pytest.mark.parametrize("over", [[], ["lr"], ["lr="], ["lr=1,,2"], ["lr=1", "lr=2"], ["seed=1,2"], ["lr=1,1"]])
def test_what_is_no_grid_says_how_one_is_written(over: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--over|sweep"):
        grid(over)


def test_a_list_is_one_value_and_points_multiply() -> None:
    found = grid(["model.sizes=[1,2],[3,4]", "--optim.learning-rate=1e-3,2e-3"])
    assert found == {"model.sizes": ["[1,2]", "[3,4]"], "optim.learning-rate": ["1e-3", "2e-3"]}
    cells = Sweep([], found, seeds=3).cells()
    assert len(cells) == 12 == len({cell.folder for cell in cells})


@pytest.mark.parametrize(
    "typed, several",
    [
        ("[[0,32],[2,64]]", ["[[0,32],[2,64]]"]), ("[[0,32],[2,64]],[[0,16]]", ["[[0,32],[2,64]]", "[[0,16]]"]),
        ("{a=[1,2],b={c=3,d=4}}, none", ["{a=[1,2],b={c=3,d=4}}", "none"]), ('"a,b",\'c,d\',e', ['"a,b"', "'c,d'", "e"]),
        ('["],",1],2', ['["],",1]', "2"]), ("don't,won't", ["don't", "won't"]), ("a],b", ["a]", "b"]),
    ],
    ids=str,
)  # fmt: skip
def test_values_part_at_the_commas_outside_of_brackets_and_quotes(typed: str, several: list[str]) -> None:
    assert grid([f"data.seq_len_schedule={typed}"]) == {"data.seq_len_schedule": several}


def test_the_table_ranks_by_the_mean_and_keeps_what_failed() -> None:
    def cell(value: str, seed: int, found: float | None, lower: bool = True) -> Cell:
        return Cell((("lr", value),), seed, Path(), found, "bpb" if found else "", lower, 4, 8.0 + seed, "" if found else "exit code 76")

    lines = lines_of([cell("1", 0, 3.0), cell("2", 0, 1.0), cell("3", 0, None), cell("1", 1, 2.0), cell("2", 1, 2.0), cell("3", 1, None)])
    assert [line.split()[0] for line in lines[1:]] == ["lr=2", "lr=1", "lr=3"]
    assert lines[1].split()[1:] == ["1.5000", "1.0000", "8.5", "2"] and lines[2].endswith("#" * 40) and lines[3].endswith("0 of 2")
    upward = lines_of([cell("1", 0, 3.0, False), cell("2", 0, 1.0, False)])
    assert [line.split()[0] for line in upward[1:]] == ["lr=1", "lr=2"]
