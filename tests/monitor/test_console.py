"""The line that moves in a terminal: how long is left is always in it."""

from __future__ import annotations

import io

import pytest

from treadle.monitor.console import Console, fitting
from treadle.terminal import columns

ROW = {"step": 137, "learning_rate": 8e-3, "grad_norm": 2.21, "tokens_per_second": 5700.0, "memory_gb": 0.44, "mfu": None}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [60, 80, 110, 130, 160])
def test_what_does_not_fit_is_left_out_and_the_rest_is_whole(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    console = Console(stream=(terminal := Terminal()))
    console.start(0, 2000)
    console.row(ROW, "loss 7.6329  bpb 3.3685", 2000, 3725)
    console.stop()
    shown = terminal.getvalue()
    assert "step 137/2000" in shown and "loss 7.6329  bpb 3.3685" in shown and "ETA 1:02:05" in shown and "\u2026" not in shown
    assert ("0.44 GB" in shown) is (columns >= 110) and ("lr 8.00e-03" in shown) is (columns >= 80)


def test_the_first_and_the_last_part_stay() -> None:
    assert fitting(["loss 1", "lr 2", "GB 3", "ETA 4"], 100) == "loss 1  lr 2  GB 3  ETA 4"
    assert fitting(["loss 1", "lr 2", "GB 3", "ETA 4"], 20) == "loss 1  lr 2  ETA 4"
    assert fitting(["loss 1", "lr 2", "GB 3", "ETA 4"], 3) == "loss 1  ETA 4"


def test_a_pipe_has_no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert columns(Terminal()) == 50 and columns(io.StringIO()) is None
