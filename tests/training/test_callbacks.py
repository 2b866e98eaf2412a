"""Callbacks: what they may ask for, that all processes agree, and what happens when one fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import treadle
from tests.conftest import make_text
from tests.conftest import treadle as command
from tests.several import run_in
from tests.training.test_training import tiny, trainer
from treadle.checkpoint.layout import steps_in
from treadle.data.base import Dataset
from treadle.errors import CallbackError, ConfigError, PeerFailed, Stopped
from treadle.training.callbacks.base import BUILTIN, Callback
from treadle.training.callbacks.health import HealthCallback
from treadle.training.context import Context
from treadle.training.requests import Requests


@pytest.fixture()
def data(text_file: Path) -> dict[str, Dataset]:
    return {s: Dataset.load(str(text_file), "byte", 32, split=s) for s in ("train", "validation")}


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


class At(Callback):
    """Does something after a step."""

    def __init__(self, step: int, work: Any) -> None:
        self.step, self.work = step, work

    def after_step(self, context: Context) -> None:
        if context.step == self.step:
            self.work(context)


# ---- what may be asked for ----


def test_a_save_and_an_evaluation_are_done_after_the_step(tmp_path: Path, data: dict) -> None:
    def both(context: Context) -> None:
        context.request("save", "wanted")
        context.request("evaluate", "wanted")

    trainer(tmp_path, data, callbacks=[At(3, both)], eval_steps=6, save_steps=6, metric_for_best_model="top5_accuracy").train()
    assert 3 in steps_in(tmp_path / "checkpoints")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r.get("split")] == [3, 6]


def test_a_stop_can_be_continued_and_an_end_is_the_end(tmp_path: Path, data: dict) -> None:
    with pytest.raises(Stopped) as caught:
        trainer(tmp_path / "a", data, callbacks=[At(2, lambda c: c.request("stop", "enough"))]).train()
    assert caught.value.exit_code == 75 and events(tmp_path / "a")[-1] | {"reason": "enough", "step": 2} == events(tmp_path / "a")[-1]

    class Ends(Callback):
        to_go_on = "--patience 9"

        def after_step(self, context: Context) -> None:
            if context.step == 2:
                context.end("good enough")

    made = trainer(tmp_path / "b", data, callbacks=[Ends()])
    summary = made.train()
    assert summary["status"] == "finished" and summary["step"] == 2 and made.state.ended == "good enough"
    newest = tmp_path / "b" / "checkpoints" / "step-00000002"
    again = trainer(tmp_path / "b", data, callbacks=[Ends()], resume=True)
    again.load_checkpoint(newest)
    assert again.finished and again.callbacks["Ends"].how_to_go_on() == "--patience 9"
    without = trainer(tmp_path / "b", data, resume=True)
    without.load_checkpoint(newest)
    assert not without.finished and without.train()["step"] == 6


def test_a_rollback_skips_rows_and_wins_over_what_else_was_asked(tmp_path: Path, data: dict) -> None:
    asked: list[int] = []

    class Back(Callback):
        def after_step(self, context: Context) -> None:
            if context.step == 5 and not asked:
                asked.append(1)
                context.request("evaluate", "dropped")
                context.request("rollback", "a bad feeling")

        def on_rollback(self, context: Context) -> None:
            asked.append(context.step)

    made = trainer(tmp_path, data, callbacks=[Back()], save_steps=4, eval_steps=50)
    made.train()
    assert asked == [1, 4] and made.state.rollbacks == 1 and made.state.position == 7
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r.get("split")] == [6] and [r["step"] for r in rows if not r.get("split")] == [1, 2, 3, 4, 5, 6]


def test_a_key_can_be_set_and_survives(tmp_path: Path, data: dict) -> None:
    made = trainer(tmp_path, data, callbacks=[At(2, lambda c: c.set("learning_rate", 0.5))], lr_scheduler_type="constant", warmup_steps=0)
    made.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["learning_rate"] for r in rows if not r.get("split")] == [0.01, 0.01, 0.5, 0.5, 0.5, 0.5]
    assert made.state.settings == {"optim.learning_rate": 0.5}
    with pytest.raises(ConfigError, match="cannot be set"):
        made.context.set("batch_size", 3)


def test_updates_can_be_skipped_and_columns_added(tmp_path: Path, data: dict) -> None:
    class Odd(Callback):
        def skip_update(self, context: Context, loss: float) -> bool:
            return context.step % 2 == 1

        def columns(self, context: Context) -> dict[str, Any]:
            return {"twice": 2 * context.step}

    made = trainer(tmp_path, data, callbacks=[Odd], learning_rate=0.1)
    made.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert made.state.skipped_steps == 3 and rows[0]["twice"] == 2


def test_state_survives_a_restart(tmp_path: Path, data: dict) -> None:
    class Counts(Callback):
        seen = 0

        def after_step(self, context: Context) -> None:
            self.seen += 1

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.seen = state.get("seen", 0)

    trainer(tmp_path, data, callbacks=[Counts()], save_steps=3, eval_steps=50).train()
    counts = Counts()
    again = trainer(tmp_path, data, callbacks=[counts], resume=True, max_steps=8)
    again.load_checkpoint(tmp_path / "checkpoints" / "step-00000003")
    assert counts.seen == 3
    again.train()
    assert counts.seen == 8


# ---- taking the place of what is built in ----


def test_a_built_in_can_be_replaced_or_left_out(tmp_path: Path, data: dict) -> None:
    class Calm(HealthCallback):
        pass

    made = trainer(tmp_path, data, callbacks=[Calm()], disabled_callbacks=["sample", "best_model"])
    names = [callback.name for callback in made.callbacks]
    assert names.count("health") == 1 and isinstance(made.callbacks["health"], Calm)
    assert "best_model" not in names and names.index("recovery") < names.index("health") < names.index("progress")
    made.train()
    assert not (tmp_path / "checkpoints" / "best.json").exists()
    with pytest.raises(ConfigError, match="did you mean 'best_model'"):
        trainer(tmp_path / "b", data, disabled_callbacks=["bestmodel"])
    with pytest.raises(ConfigError, match="is no callback"):
        trainer(tmp_path / "b", data, callbacks=[print])
    with pytest.raises(ConfigError, match="without arguments"):
        trainer(tmp_path / "b", data, callbacks=[At])


def test_every_built_in_behaviour_is_a_callback() -> None:
    folder = Path(treadle.__file__).parent / "training" / "callbacks"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__", "base"} == set(BUILTIN)


def test_metrics_decide_in_the_direction_that_the_objective_gives_them(tmp_path: Path, data: dict) -> None:
    values = iter([0.1, 0.3, 0.2, 0.25, 0.5, 0.6])
    made = trainer(tmp_path, data, eval_steps=1, early_stopping_patience=2, early_stopping_metric="accuracy",
                   metric_for_best_model="accuracy")  # fmt: skip
    real = made.evaluator.evaluate
    made.evaluator.evaluate = lambda *a, **k: {**real(*a, **k), "accuracy": next(values)}  # type: ignore[method-assign, dict-item]
    summary = made.train()
    assert summary["step"] == 4 and summary["best_step"] == 2 and made.state.ended == "no better accuracy in 2 evaluations"
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        trainer(tmp_path / "b", data, early_stopping_metric="acuracy")


def test_a_rollback_asked_for_at_an_evaluation_takes_the_place_of_all_else(tmp_path: Path, data: dict) -> None:
    class Once(Callback):
        done = False

        def on_evaluate(self, context: Context) -> None:
            if context.step == 4 and not self.done:
                self.done = True
                context.request("save", "not of what is given up")
                context.request("rollback", "these numbers are bad")

    made = trainer(tmp_path, data, callbacks=[Once()], eval_steps=4, save_steps=2)
    made.train()
    back = next(e for e in events(tmp_path) if e["event"] == "rolled_back")
    assert (back["step"], back["to"], back["reason"]) == (4, 2, "these numbers are bad")
    assert made.state.step == 6 and made.state.rollbacks == 1
    assert [e["step"] for e in events(tmp_path) if e["event"] == "saved"] == [2, 4, 6]  # 4 as trained anew


def test_patience_that_is_set_later_knows_what_was_before(tmp_path: Path, data: dict) -> None:
    first = trainer(tmp_path, data, max_steps=3, eval_steps=1)
    first.train()
    remembered = first.callbacks["early_stopping"].state_dict()
    assert remembered["best"] is not None
    again = trainer(tmp_path, data, resume=True, max_steps=6, eval_steps=1, early_stopping_patience=1, early_stopping_threshold=99.0)
    summary = again.train()
    assert summary["step"] == 4 and again.state.ended_by == "early_stopping"
    assert again.callbacks["early_stopping"].best == remembered["best"]


# ---- one that fails ----


@pytest.mark.parametrize("hook", ["on_train_start", "before_step", "after_step", "on_log", "on_evaluate", "on_save"])
def test_one_that_raises_names_itself_and_the_run_is_saved(tmp_path: Path, data: dict, hook: str) -> None:
    def fail(self: Callback, context: Context) -> None:
        if context.step >= 3 or hook == "on_train_start":
            raise ValueError("no such tea")

    made = trainer(tmp_path, data, callbacks=[type("Faulty", (Callback,), {hook: fail})()], eval_steps=3, save_steps=3)
    with pytest.raises(CallbackError, match=rf"Faulty failed in {hook}: ValueError: no such tea \(.*test_callbacks.py:\d+\)") as caught:
        made.train()
    assert caught.value.exit_code == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["exit_code"] == 1
    if hook != "on_train_start":
        saved = steps_in(tmp_path / "checkpoints")[0]
        again = trainer(tmp_path, data, resume=True)
        again.load_checkpoint(tmp_path / "checkpoints" / f"step-{saved:08d}")
        assert saved == made.state.step and again.train()["step"] == 6


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(make_text(50))
    (tmp_path / "mine.py").write_text(
        "import treadle\n\n\nclass Faulty(treadle.Callback):\n    def after_step(self, context):\n        if context.step == 2:\n"
        "            1 / 0\n\n\nclass Quiet(treadle.Callback):\n    name = 'sample'\n\n\nclass Not:\n    pass\n"
    )
    line = ["train", "story.txt", "--output_dir", "r", "--max_steps", 4, "--hidden_size", 16, "--num_heads", 2, "--seq_len", 16,
            "--batch_size", 2, "--num_layers", 1, "--tokenizer.name", "byte"]  # fmt: skip
    out = command(*line, "--callbacks", "mine.py:Faulty,mine.py:Quiet", cwd=tmp_path)
    assert out.returncode == 1 and "Faulty failed in after_step: ZeroDivisionError" in out.stderr and "mine.py:7" in out.stderr
    assert "Traceback" not in out.stderr and not (tmp_path / "r" / "samples").exists()
    on = command(*line, "--callbacks", "mine.py:Quiet", cwd=tmp_path)
    assert on.returncode == 0 and "Resumed from step 2" in on.stdout, on.stderr
    wrong = command(*line, "--callbacks", "mine.py:Not", "--fresh", cwd=tmp_path)
    assert wrong.returncode == 2 and "Callback" in wrong.stderr


# ---- several processes ----


def test_what_one_process_asks_all_do(text_file: Path, tmp_path: Path) -> None:
    run_in(2, _asked_in_the_second, str(text_file), str(tmp_path / "asked"))
    rows = [json.loads(line) for line in (tmp_path / "asked" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r.get("split")] == [2] and rows[-1]["learning_rate"] == 0.25
    assert [e["reason"] for e in events(tmp_path / "asked") if e["event"] == "stopped"] == ["the second says so"]


def _built(text: str, folder: str, callbacks: Any) -> treadle.Trainer:
    data = {s: Dataset.load(text, "byte", 32, split=s) for s in ("train", "validation")}
    config = treadle.TrainConfig(output_dir=folder, max_steps=6, batch_size=2, logging_steps=1, eval_steps=9, sample_tokens=0, eval_rows=4,
                                 report_to=["jsonl"], lr_scheduler_type="constant", warmup_steps=0)  # fmt: skip
    return treadle.Trainer(tiny(), data["train"], data["validation"], config, callbacks=callbacks)


def _asked_in_the_second(text: str, folder: str) -> None:
    def ask(context: Context) -> None:
        if context.world.rank == 1:
            context.request("evaluate", "x")
            context.set("optim.learning_rate", 0.25)

    def stop(context: Context) -> None:
        if context.world.rank == 1:
            context.request("stop", "the second says so", 75)

    class First(At):
        name = "first"

    made = _built(text, folder, [First(2, ask), At(4, stop)])
    with pytest.raises(Stopped) as caught:
        made.train()
    assert made.state.step == 4 and caught.value.exit_code == 75 and made.state.settings == {"optim.learning_rate": 0.25}


def test_one_that_fails_in_one_process_ends_all_saved(text_file: Path, tmp_path: Path) -> None:
    run_in(2, _failing_in_the_second, str(text_file), str(tmp_path / "r"))
    assert steps_in(tmp_path / "r" / "checkpoints")[0] == 3


def _failing_in_the_second(text: str, folder: str) -> None:
    def fail(context: Context) -> None:
        assert context.world.rank != 1, "here"

    made = _built(text, folder, [At(3, fail)])
    with pytest.raises(CallbackError if torch.distributed.get_rank() == 1 else PeerFailed, match="At failed in after_step") as caught:
        made.train()
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("hook", ["skip_update", "on_save"])
def test_one_that_fails_in_one_process_leaves_equal_weights(text_file: Path, tmp_path: Path, hook: str) -> None:
    """skip_update: the update of that step is skipped in both. on_save, at the last step: nothing comes after it."""
    one, two = run_in(2, _failing_hook_in_the_second, str(text_file), str(tmp_path / "r"), hook)
    assert one == two
    assert steps_in(tmp_path / "r" / "checkpoints")[0] == one[1] == (3 if hook == "skip_update" else 6)


def _failing_hook_in_the_second(text: str, folder: str, hook: str) -> Any:
    def fail(self: Callback, context: Context, *more: Any) -> bool:
        assert context.world.rank != 1 or context.step < (2 if hook == "skip_update" else 6), "here"
        return False

    made = _built(text, folder, [type("Faulty", (Callback,), {hook: fail})()])
    second = torch.distributed.get_rank() == 1
    with pytest.raises(CallbackError if second else PeerFailed, match=f"Faulty failed in {hook}"):
        made.train()
    return [float(weight.double().sum()) for weight in made.model.parameters()], made.state.step


def test_of_two_stops_the_graver_counts() -> None:
    from treadle.distributed.world import World

    requests = Requests()
    requests.ask("stop", "patience", 0, "early_stopping")
    requests.ask("stop", "SIGTERM", 143, "commands")
    requests.ask("stop", "later", 75, "x")
    requests.agree(World())
    assert requests.exit_code == 143 and requests.reasons["stop"] == "SIGTERM" and requests.stopped_by == "commands"


def test_the_weights_of_the_start_are_evaluated_once_where_that_is_asked_for(tmp_path: Path, data: Any) -> None:
    """`--eval_on_start`; a run that goes on from the checkpoint of step 0 does not do it again."""

    class Seen(Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_evaluate(self, context: Context) -> None:
            self.steps.append(context.step)

    seen, again, plain = Seen(), Seen(), Seen()
    trainer(tmp_path / "a", data, callbacks=[seen], max_steps=2, eval_steps=9, eval_on_start=True).train()
    trainer(tmp_path / "a", data, callbacks=[again], resume=True, max_steps=3, eval_steps=9, eval_on_start=True).train()
    trainer(tmp_path / "b", data, callbacks=[plain], max_steps=2, eval_steps=9).train()
    assert (seen.steps, again.steps, plain.steps) == ([0, 2], [3], [2])
