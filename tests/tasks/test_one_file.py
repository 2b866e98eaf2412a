"""The two tasks of docs/extending.md, each one file outside the package, through everything that a run meets."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import treadle
from tests.conftest import treadle as command
from tests.several import run_in
from tests.training.test_resume import rows_of, same_end, start
from treadle.dry_run import check, plan
from treadle.errors import ConfigError, InputError
from treadle.evaluation.report import evaluate_run
from treadle.monitor.console import Console
from treadle.reporting.compare import compare, lines_of
from treadle.reporting.report import collected, found_in
from treadle.start import Request, train

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
TASKS = {"two_heads": 90, "reversal": 100}  # at most so many lines


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files that the document shows, written as a reader would."""
    folder = tmp_path_factory.mktemp("tasks")
    shown = dict(re.findall(r"`(\w+)\.py`:\n\n```python\n(.*?)```", DOCUMENT.read_text(), flags=re.S))
    assert shown.keys() == TASKS.keys()
    for name, text in shown.items():
        (folder / f"{name}.py").write_text(text)
    return {name: folder / f"{name}.py" for name in shown}


def request(file: Path, folder: Path, **keys: Any) -> Request:
    flags = {"output_dir": str(folder), "logging_steps": "2", "eval_rows": "32", "batch_size": "8", "report_to": "jsonl", **keys}
    return Request(str(file), {key: str(value) for key, value in flags.items()})


def run(file: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    return train(request(file, folder, **keys), Console(quiet=True))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_short_and_uses_public_names_alone(files: dict[str, Path], name: str) -> None:
    text = files[name].read_text()
    assert text.count("\n") <= TASKS[name]
    tree = ast.parse(text)
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    assert {m for m in modules if m.startswith("treadle")} == {"treadle"}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "treadle"}
    assert used and used <= set(treadle.__all__)


@pytest.mark.parametrize("name", TASKS)
def test_killed_and_continued_bit_for_bit(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    keys = {"max_steps": 40, "save_steps": 5, "eval_steps": 20, "logging_steps": 3}
    run(files[name], tmp_path / "whole", **keys)
    line = ["python", "-m", "treadle", "train", *_typed(files[name], tmp_path / "killed", **keys)]
    import sys

    process = start([sys.executable, *line[1:]])
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert run(files[name], tmp_path / "killed", **keys)["step"] == 40
    events = [json.loads(row)["event"] for row in (tmp_path / "killed" / "events.jsonl").read_text().splitlines()]
    assert "resumed" in events  # killed after its first checkpoint
    same_end(tmp_path / "whole", tmp_path / "killed", 40)


def _typed(file: Path, folder: Path, **keys: Any) -> list[str]:
    return [str(file), *(part for key, value in request(file, folder, **keys).flags.items() for part in (f"--{key}", value))]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", TASKS)
def test_two_processes_are_as_one(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    keys = {"max_steps": 6, "eval_steps": 3, "global_batch_size": 8}
    run(files[name], tmp_path / "one", **keys)
    for mode in ("ddp", "fsdp"):
        run_in(2, _run_quietly, str(files[name]), str(tmp_path / mode), {**keys, "batch_size": 4, "parallel.mode": mode})
        ours, theirs = rows_of(tmp_path / "one"), rows_of(tmp_path / mode)
        assert len(ours) == len(theirs) == 6
        for a, b in zip(ours, theirs):
            numbers = [key for key, value in a.items() if isinstance(value, float)]
            assert [b[key] for key in numbers] == pytest.approx([a[key] for key in numbers], rel=2e-4, abs=1e-6)


def _run_quietly(file: str, folder: str, keys: dict[str, Any]) -> None:
    run(Path(file), Path(folder), **keys)


def test_two_heads_from_the_command_line_to_the_table(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, continue, evaluate, compare, plan, check: what a user sees is the objective's own."""
    file = files["two_heads"]
    out = command("train", *_typed(file, tmp_path / "a", max_steps=150, eval_steps=75, eval_rows=256, metric_for_best_model="accuracy"))
    assert out.returncode == 0, out.stderr
    assert re.search(r"step 150/150  loss \d\.\d{4}  loss_largest \d", out.stdout) and "bpb" not in out.stdout
    assert re.search(r"evaluation at step 150: loss \d\.\d{4}  error of the mean \d\.\d{4}  accuracy \d+\.\d%", out.stdout)
    assert json.loads((tmp_path / "a" / "checkpoints" / "best.json").read_text())["metrics"].keys() == {"accuracy"}
    run(file, tmp_path / "b", max_steps=8, seed=7)
    report = evaluate_run(str(tmp_path / "a"))
    assert set(report["metrics"]) == {"loss", "loss_largest", "mean_error", "accuracy"} and "baselines" not in report
    assert report["metrics"]["accuracy"] > 0.9
    table = compare([str(tmp_path / "a"), str(tmp_path / "b")])
    assert f"measuring {tmp_path / 'b'} (2 of 2)" in capsys.readouterr().err
    lines = lines_of(table)
    assert "accuracy" in lines[0] and "mean error" in lines[0] and "bits/byte" not in lines[0] and "% *" in lines[1] and "%" in lines[2] and " *" not in lines[2]
    better = {"loss": True, "mean_error": True, "accuracy": False, "loss_largest": None}  # of the last the objective says nothing
    assert {name: how["lower_is_better"] for name, how in table[0]["shown"].items()} == better
    board = collected(*found_in([str(tmp_path / "a"), str(tmp_path / "b")]), model=True)["boards"][0]
    assert {column["key"]: column["lower_is_better"] for column in board["columns"] if column.get("unit") == "measured here"} == {
        f"here {name}": lower for name, lower in better.items()}  # fmt: skip
    other = tmp_path / "c"
    run(file, other, max_steps=2, integers=5)
    with pytest.raises(InputError, match="different data"):
        compare([str(tmp_path / "a"), str(other)])
    with pytest.raises(InputError, match="reads no file"):
        evaluate_run(str(tmp_path / "a"), data="story.txt")
    planned = plan(Request(str(file), {"batch_size": "8"}), Console(quiet=True))
    assert planned["parameters"] == 683 and planned["seq_len"] == 16
    assert check(Request(str(file), {}), Console(quiet=True))["loss"] > 0


def test_what_is_wrong_with_a_task_is_said(files: dict[str, Path], tmp_path: Path) -> None:
    file = files["two_heads"]
    run(file, tmp_path / "a", max_steps=2)
    for keys, words in (
        ({"integers": 7}, "task.integers was 10"),
        ({"lenght": 3}, "did you mean 'length'"),
        ({"integers": 1}, "greater than or equal to 2"),
        ({"metric_for_best_model": "acuracy", "fresh": ""}, "did you mean 'accuracy'"),
    ):
        wanted = request(file, tmp_path / ("a" if "integers" in keys else "new"), max_steps=2, **keys)
        wanted.fresh = "fresh" in (wanted.flags or {}) and wanted.flags.pop("fresh") == ""  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match=words):
            train(wanted, Console(quiet=True))
    for text, words in (
        ("import treadle\n", "nothing to train"),
        ("import treadle\nclass A(treadle.NextToken): pass\nclass B(treadle.NextToken): pass\n", "several classes"),
        ("import treadle\nclass A(treadle.NextToken): pass\nrecipe = 3\n", "must be a table"),
        ("import treadle\n1 / 0\n", "line 2"),
    ):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(ConfigError, match=words):
            train(Request(str(tmp_path / "bad.py")), Console(quiet=True))
    with pytest.raises(ConfigError, match="--max_steps"):
        train(request(file, tmp_path / "endless", max_steps="none"), Console(quiet=True))


def test_the_encoder_decoder_writes_by_itself_what_it_learned(files: dict[str, Path], tmp_path: Path) -> None:
    """Exactly, for sequences of four; what it attends to comes with the prompt and stays in the state."""
    summary = run(files["reversal"], tmp_path / "r", max_steps=250, batch_size=64, length=4, tokens=6, eval_steps=250, eval_rows=256)
    assert summary["status"] == "finished"
    metrics = evaluate_run(str(tmp_path / "r"))["metrics"]
    assert metrics["exact"] == 1.0 and "bpb" not in metrics
    model, tokenizer = treadle.load(tmp_path / "r")
    assert tokenizer is None
    source = torch.tensor([[0, 1, 2, 3], [5, 5, 0, 1]])
    written = model.generate([[6], [6]], 4, temperature=0, extras={"source": source})
    assert written[:, 1:].tolist() == source.flip(1).tolist()
