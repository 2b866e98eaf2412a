"""How long is left: the steps, and the evaluations and saves between them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_training import data, trainer  # noqa: F401  (a fixture)
from treadle.data.base import Dataset
from treadle.monitor.console import Console
from treadle.training.callbacks.base import Callback
from treadle.training.callbacks.commands import status
from treadle.training.context import Context
from treadle.training.remaining import EVALUATION, SAVE, pauses_left, seconds_left

PAUSE = 1.0  # seconds; steps of this model take milliseconds


class SlowEvaluation(Callback):
    def __init__(self) -> None:
        self.statuses: dict[int, str] = {}

    def after_step(self, context: Context) -> None:
        self.statuses[context.step] = status(context)

    def on_evaluate(self, context: Context) -> None:
        time.sleep(PAUSE)


@pytest.mark.parametrize("eval_steps", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("save_steps", [1, 2, 5, 6, 30])
@pytest.mark.parametrize("last", [1, 6, 13])
def test_pauses_are_counted_as_a_walk_over_the_steps_counts_them(eval_steps: int, save_steps: int, last: int) -> None:
    for step in range(1, last + 1):
        walked = {EVALUATION: 0, SAVE: 0}
        for coming in range(step, last + 1):
            if coming % eval_steps == 0 or coming == last:
                walked[EVALUATION] += 1
            elif coming % save_steps == 0:
                walked[SAVE] += 1
        assert pauses_left(step, last, eval_steps, save_steps) == walked


def test_evaluations_to_come_are_in_the_eta(tmp_path: Path, data: dict[str, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    said: dict[int, float] = {}
    monkeypatch.setattr(Console, "row", lambda self, row, measured, total, remaining, whole="": said.update({row["step"]: remaining}))
    slow = SlowEvaluation()
    made = trainer(tmp_path, data, callbacks=[slow], eval_steps=2, save_steps=100)
    made.train()
    assert said[2] < PAUSE  # of the first its forward passes alone are known
    assert 2 * PAUSE < said[3] < 3 * PAUSE and 2 * PAUSE < said[4] < 3 * PAUSE  # those after steps 4 and 6
    assert PAUSE < said[5] < 2 * PAUSE and PAUSE < said[6] < 2 * PAUSE
    assert any(f"ETA 0:0{seconds}" in slow.statuses[3] for seconds in (2, 3, 4))  # what `treadle ctl RUN status` says; the first step is slow
    assert made.context.pauses.keys() == {EVALUATION}


def test_saves_between_evaluations_are_in_it_too(tmp_path: Path, data: dict[str, Dataset]) -> None:  # noqa: F811
    seen: dict[int, dict[str, Any]] = {}

    class Looks(Callback):
        def after_step(self, context: Context) -> None:
            seen[context.step] = {"left": seconds_left(context, 0.0), **context.pauses}
            if context.step == 1:
                rows, batch = context.eval_dataset.rows_per_epoch, context.plan.global_batch  # type: ignore[union-attr]
                assert seconds_left(context, 3.0) == pytest.approx(11 * 3.0 + 3 * min(rows or 0, context.config.eval.eval_rows or 0) / batch)

    trainer(tmp_path, data, callbacks=[Looks()], eval_steps=4, save_steps=2, max_steps=12).train()
    assert seen[2] == {"left": 0.0} and set(seen[3]) == {"left", SAVE} and set(seen[5]) == {"left", SAVE, EVALUATION}
    assert seen[5]["left"] == pytest.approx(2 * seen[5][EVALUATION] + 2 * seen[5][SAVE])  # after 8 and 12, after 6 and 10
