"""Health: spikes, non-finite values, collapse, advice, rollback and the watchdog, each provoked."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import flags, treadle
from tests.training.test_training import trainer
from treadle.data.base import Dataset
from treadle.data.dataset import TokenDataset
from treadle.errors import Diverged
from treadle.monitor.health import Health
from treadle.processes import waited_for_cores


@pytest.fixture()
def data(text_file: Path) -> dict[str, Dataset]:
    return {s: Dataset.load(str(text_file), "byte", 32, split=s) for s in ("train", "validation")}


def feed(health: Health, steps: int, loss: float = 2.0, norm: float = 1.0, start: int = 0) -> list[str]:
    found = []
    for n in range(start, start + steps):
        wobble = 0.01 * ((n * 37) % 11 - 5)
        found += [f.kind for f in health.observe(n + 1, loss + wobble, norm + wobble, 0.1, 1000, True)]
    return found


def test_spikes_and_outliers_against_a_running_distribution() -> None:
    health = Health()
    assert feed(health, 60) == []
    assert [f.kind for f in health.observe(61, 3.5, 1.0, 0.1, 1000, True)] == ["loss_spike"]
    assert max(health.losses) < 3  # a spike does not become usual
    assert [f.kind for f in health.observe(62, 2.0, 9.0, 0.1, 1000, True)] == ["gradient_outlier"]
    assert health.observe(63, 3.5, 1.0, 0.1, 1000, False) == []  # not before warm-up has ended
    assert not Health().is_spike(100.0, True)  # nothing to compare with yet
    assert health.observe(64, 2.0, 1.0, 1.0, 1000, True) == []  # one slow step is no collapse
    kinds = [f.kind for n in range(20) for f in health.observe(65 + n, 2.0, 1.0, 1.0, 1000, True)]
    assert kinds == ["throughput_collapse"]


def test_advice_is_said_once() -> None:
    health = Health()
    assert feed(health, 1000).count("flat_loss") == 1
    falling = Health()
    kinds = [k for n in range(1000) for k in feed(falling, 1, 5 * 0.998**n, start=n)]
    assert "flat_loss" not in kinds
    erratic = Health()
    kinds = []
    for n in range(256):
        norm = 50.0 if n % 16 == 0 else 0.5
        kinds += [f.kind for f in erratic.observe(n + 1, 2.0, norm, 0.1, 1000, True)]
    assert kinds.count("erratic_gradient") == 1
    assert [f.kind for f in health.waiting(0.5, 5.0)] == ["slow_data"] and health.waiting(0.5, 5.0) == []
    assert Health().waiting(0.01, 5.0) == [] == Health().waiting(0.5, 0.1)


def test_a_busy_machine_is_said_with_the_threads_to_type() -> None:
    health = Health()
    (finding,) = health.crowded(10.0, 9.3, 2)
    assert finding.kind == "busy_machine" and finding.text.endswith("OMP_NUM_THREADS=1") and health.crowded(10.0, 9.3, 2) == []
    assert Health(**health.to_json()).crowded(10.0, 9.3, 2), "another start may be on another machine"
    assert Health().crowded(10.0, 30.0, 16)[0].text.endswith("OMP_NUM_THREADS=13")
    assert Health().crowded(10.0, 7.0, 2)[0].text.endswith("OMP_NUM_THREADS=1")
    assert Health().crowded(10.0, 0.3, 2) == [] == Health().crowded(10.0, 9.3, 1)  # idle; nobody to wait for
    assert Health().crowded(10.0, math.nan, 2) == []  # no figure on this system


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="this system does not say how long threads wait for a core")
def test_time_without_a_core_is_counted_over_all_threads() -> None:
    stop, before = threading.Event(), waited_for_cores()
    others = [threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(stop.is_set, True)]) for _ in range(3)]
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # inherited by the threads: four that want one core
    try:
        for thread in others:
            thread.start()
        until = time.perf_counter() + 0.5
        while time.perf_counter() < until:
            torch.ones(300, 300) @ torch.ones(300, 300)  # lets the others run meanwhile
        waited = waited_for_cores() - before
    finally:
        stop.set()
        os.sched_setaffinity(0, allowed)
        for thread in others:
            thread.join()
    assert waited > 0.05


def test_a_training_beside_busy_programs_says_what_to_type(
    tmp_path: Path, data: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import treadle.training.callbacks.health as callback

    clock = iter(range(10**6))
    monkeypatch.setattr(callback, "CORES_SECONDS", 0.0)
    monkeypatch.setattr(callback, "waited_for_cores", lambda: 1e3 * next(clock))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    trainer(tmp_path, data, max_steps=3).train()
    assert capsys.readouterr().err.count("OMP_NUM_THREADS=1") == 1


def test_a_flat_training_is_told_so(tmp_path: Path, data: dict, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(
        tmp_path, data, max_steps=660, learning_rate=1e-12, eval_steps=10_000, logging_steps=100, batch_size=32
    ).train()
    err = capsys.readouterr().err
    assert err.count("the loss has not fallen") == 1 and "--learning_rate" in err


def test_the_windows_survive_a_checkpoint() -> None:
    health = Health()
    feed(health, 100)
    back = Health(6.0, **json.loads(json.dumps(health.to_json())))
    assert back.losses == health.losses and back.is_spike(3.5, True) and back.said == health.said


def change_batches(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """change(data step, micro-batches) -> micro-batches, wherever training reads."""
    real = TokenDataset.step_reader

    def reader(self: TokenDataset, position: int, plan: Any) -> Any:
        read = real(self, position, plan)
        return lambda step: change(step, read(step))

    monkeypatch.setattr(TokenDataset, "step_reader", reader)


@pytest.fixture()
def poison(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Rows that make the loss NaN (or huge), by data step."""
    from treadle.objectives.next_token import NextToken

    bad: dict[int, float] = {}
    real_call = NextToken.__call__

    def mark(step: int, micro_batches: Any) -> Any:
        for batch in micro_batches:
            batch.extras["factor"] = torch.tensor([bad.get(step, 1.0)])
        return micro_batches

    def call(self: NextToken, model: Any, batch: Any) -> Any:
        parts = real_call(self, model, batch)
        if "factor" in batch.extras:
            part = parts.losses["next_token"]
            part.total = part.total * batch.extras["factor"][0]
        return parts

    change_batches(monkeypatch, mark)
    monkeypatch.setattr(NextToken, "__call__", call)
    return bad


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_rollback_skips_the_rows_and_goes_on(tmp_path: Path, data: dict, poison: dict) -> None:
    """Three bad batches in a row: back to the checkpoint of step 4, past those rows, to the end; the log has no gaps."""
    poison.update(dict.fromkeys((5, 6, 7), math.nan))
    made = trainer(tmp_path, data, max_steps=14, save_steps=4, eval_steps=100, nonfinite_limit=3)
    assert made.train()["step"] == 14
    assert made.state.rollbacks == 1 and made.state.position - made.state.step == 4
    back = [e for e in events(tmp_path) if e["event"] == "rolled_back"]
    assert back[0]["step"] == 8 and back[0]["to"] == 4
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [s for s in steps if steps.count(s) == 1][:13] == list(range(1, 14))
    assert all(bool(p.isfinite().all()) for p in made.model.parameters())


def test_a_rolled_back_run_resumes_bit_for_bit(tmp_path: Path, data: dict, poison: dict) -> None:
    poison.update(dict.fromkeys((5, 6, 7), math.nan))
    keys = {"save_steps": 4, "eval_steps": 100, "nonfinite_limit": 3, "lr_scheduler_type": "constant"}
    whole = trainer(tmp_path / "a", data, max_steps=14, **keys)
    whole.train()
    trainer(tmp_path / "b", data, max_steps=12, **keys).train()
    rest = trainer(tmp_path / "b", data, resume=True, max_steps=14, **keys)
    rest.load_checkpoint(tmp_path / "b" / "checkpoints" / "step-00000012")
    rest.train()
    for a, b in zip(whole.model.parameters(), rest.model.parameters()):
        assert torch.equal(a, b)


def test_the_third_rollback_is_76(tmp_path: Path, data: dict, poison: dict) -> None:
    poison.update(dict.fromkeys(range(6, 100), math.nan))
    with pytest.raises(Diverged) as caught:
        trainer(tmp_path, data, max_steps=40, save_steps=2, eval_steps=100, nonfinite_limit=2).train()
    assert caught.value.exit_code == 76 and "rollback 3" in str(caught.value)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "diverged"
    with pytest.raises(Diverged, match="no checkpoint to go back to"):
        trainer(tmp_path / "b", data, max_steps=40, save_steps=20, eval_steps=100, nonfinite_limit=2).train()


@pytest.mark.parametrize("policy", ["report", "skip", "rollback", "stop"])
def test_what_a_spike_does(tmp_path: Path, data: dict, poison: dict, policy: str) -> None:
    poison[50] = 30.0
    made = trainer(tmp_path, data, max_steps=60, save_steps=45, eval_steps=100, on_spike=policy, warmup_steps=5,
                   learning_rate=1e-4, max_grad_norm=0.0)  # fmt: skip
    if policy == "stop":
        with pytest.raises(Diverged, match="on_spike"):
            made.train()
        return
    made.train()
    kinds = [e["event"] for e in events(tmp_path)]
    assert "loss_spike" in kinds
    assert made.state.skipped_steps == (1 if policy == "skip" else 0)
    assert made.state.position - made.state.step == (6 if policy == "rollback" else 0)


def test_sizes_of_gradients_and_activations_on_request(tmp_path: Path, data: dict) -> None:
    trainer(tmp_path, data, health=True, logging_steps=2).train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    row = next(r for r in rows if r["step"] == 4 and "grad_norm" in r)
    for name in ("activation_rms_block_0", "activation_rms_block_1", "gradient_rms_block_1"):
        assert row[name] > 0
    trainer(tmp_path / "off", data).train()
    assert "rms" not in (tmp_path / "off" / "metrics.jsonl").read_text()


HANGS = """
import time
from treadle.models.transformer import Transformer

class Hangs(Transformer):
    arch = "hangs"
    calls = 0

    def hidden(self, batch, state=None):
        Hangs.calls += 1
        if Hangs.calls == 6:
            time.sleep(600)
        return super().hidden(batch, state)
"""


def test_a_hung_step_dumps_stacks_and_exits_75(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    line = [
        "train",
        text_file,
        "--run_name",
        "h",
        "--model.arch",
        "hangs.py:Hangs",
        "--step_timeout",
        2,
        "--save_steps",
        2,
    ]
    out = treadle(*line, *flags(max_steps=50, eval_steps=1000), cwd=tmp_path, timeout=40)
    assert out.returncode == 75 and "step_timeout" in out.stderr
    stacks = (tmp_path / "runs" / "h" / "stacks.txt").read_text()
    assert "hangs.py" in stacks and "in hidden" in stacks
    assert (tmp_path / "runs" / "h" / "checkpoints" / "step-00000004").is_dir()


def test_a_stop_is_heard_while_the_step_waits_for_data(
    tmp_path: Path, data: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading
    import time

    from treadle.errors import Stopped

    change_batches(monkeypatch, lambda step, micro: (time.sleep(8 if step == 3 else 0), micro)[1])
    made = trainer(tmp_path, data, max_steps=10, eval_steps=100, save_steps=100)
    asked: list[float] = []

    def ask() -> None:
        while made.state.step < 3:
            time.sleep(0.01)
        time.sleep(0.3)
        asked.append(time.monotonic())
        made.context.request("stop", "stop")

    threading.Thread(target=ask, daemon=True).start()
    real_save, saved = made._save, []
    monkeypatch.setattr(made, "_save", lambda **keys: (real_save(**keys), saved.append(time.monotonic()))[0])
    with pytest.raises(Stopped) as caught:
        made.train()
    assert caught.value.exit_code == 75 and saved[-1] - asked[0] < 2
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def slow_data(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    import time

    change_batches(monkeypatch, lambda step, micro: (time.sleep(seconds), micro)[1])


def test_slow_data_is_no_hang(tmp_path: Path, data: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_data(monkeypatch, 0.8)
    exits: list[int] = []
    monkeypatch.setattr("treadle.monitor.watchdog.os._exit", exits.append)
    assert trainer(tmp_path, data, max_steps=4, step_timeout=0.6).train()["step"] == 4
    assert exits == [] and not (tmp_path / "stacks.txt").exists()


def test_waiting_for_data_gets_advice_and_workers(
    tmp_path: Path, data: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With num_workers = auto two workers join after 50 steps, and the batches stay the same; the advice comes once."""
    keys = {"max_steps": 60, "logging_steps": 5, "eval_steps": 1000, "save_steps": 1000}
    quick = trainer(tmp_path / "quick", data, **keys)
    quick.train()
    monkeypatch.setattr("treadle.monitor.health.WAIT_SECONDS", 0.0)
    slow_data(monkeypatch, 0.03)
    said: list[str] = []
    made = trainer(tmp_path / "slow", data, **keys)
    monkeypatch.setattr(made.console, "say", said.append)
    made.train()
    assert capsys.readouterr().err.count("waiting for data takes") == 1
    assert sum("2 data workers from here on" in line for line in said) == 1
    for a, b in zip(quick.model.parameters(), made.model.parameters()):
        assert torch.equal(a, b)
