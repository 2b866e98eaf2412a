"""torch_compile = auto: what is decided from what is measured, and that a run keeps it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import treadle
from treadle.training import compiling
from treadle.training.compiling import Measured, decide


def test_decisions() -> None:
    quick = Measured(eager=1.0, compiled=0.6, cold=30.0)
    assert decide(quick, 50, paid=True)[0]
    assert not decide(quick, 50, paid=False)[0] and decide(quick, 100, paid=False)[0]
    assert not decide(Measured(1.0, 0.97, 1.0), 10_000, paid=True)[0]
    chosen, why = decide(Measured(1.0, problem="RuntimeError: no"), 10_000, paid=True)
    assert not chosen and "does not work here: RuntimeError: no" in why
    assert not decide(None, 5, paid=True)[0]


def run(folder: Path, steps: int, resume: bool = False, **keys: Any) -> treadle.Trainer:
    text = folder.parent / "text.txt"
    text.write_text("and so on, as it was said before. " * 200)
    data = treadle.Dataset.load(str(text), tokenizer="byte", seq_len=16)
    model = treadle.build("transformer", vocab_size=256, hidden_size=16, num_layers=2, num_heads=2)
    config = treadle.TrainConfig(output_dir=str(folder), max_steps=steps, batch_size=2, torch_compile="auto", num_workers=0, **keys)
    return treadle.Trainer(model, data, config=config, resume=resume)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Steps that take what the test says, and blocks that are only said to be compiled."""
    said: dict[str, Any] = {"eager": 30.0, "compiled": 20.0, "compilations": 0, "timed": 0}
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))

    def compile_blocks(model: Any) -> None:
        said["compilations"] += 1
        said["is"] = True

    def uncompile(model: Any) -> None:
        said["is"] = False

    def timed(assembly: Any, micros: Any) -> tuple[float, float]:
        said["timed"] += 1
        if said.get("is") and said["compiled"] is None:
            raise RuntimeError("no such header\nlong story")
        own = said["compiled"] if said.get("is") else said["eager"]
        return own + 5.0, own

    monkeypatch.setattr(compiling, "compile_blocks", compile_blocks)
    monkeypatch.setattr(compiling, "_uncompile", uncompile)
    monkeypatch.setattr(compiling, "_time", timed)
    monkeypatch.setattr(compiling, "_impossible", lambda *_: "")
    return said


def test_it_is_measured_once_and_kept(measured: dict[str, Any], tmp_path: Path) -> None:
    first = run(tmp_path / "a", 10)
    assert first.recipe.train.torch_compile is True and measured["is"] and measured["timed"] == 2
    again = run(tmp_path / "b", 10)
    assert again.recipe.train.torch_compile is True and measured["timed"] == 2
    assert run(tmp_path / "c", 2, weight_decay=0.0).recipe.train.torch_compile is True  # 20 s saved for 5
    first.train()
    assert tomllib.loads((tmp_path / "a" / "config.toml").read_text())["train"]["torch_compile"] is True


def test_it_stays_eager_where_that_is_no_worse(measured: dict[str, Any], tmp_path: Path) -> None:
    measured["compiled"] = 29.5
    assert run(tmp_path / "a", 10).recipe.train.torch_compile is False and not measured["is"]
    measured["eager"] = 0.001  # too short to be worth a compiler's start; the answer before is not about this batch
    assert run(tmp_path / "b", 10, seed=3).recipe.train.torch_compile is False


def test_what_cannot_compile_is_said(measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured["compiled"] = None
    made = run(tmp_path / "a", 10)
    assert made.recipe.train.torch_compile is False and not measured["is"]
    place = next((tmp_path / "cache" / "compiled").glob("*.json"))
    assert "no such header" in place.read_text()
    assert run(tmp_path / "b", 10).recipe.train.torch_compile is False and measured["timed"] == 2


def test_short_runs_are_not_compiled(measured: dict[str, Any], tmp_path: Path) -> None:
    measured["eager"] = 0.01
    assert run(tmp_path / "a", 10).recipe.train.torch_compile is False
    assert not measured["compilations"] and not (tmp_path / "cache" / "compiled").exists()
