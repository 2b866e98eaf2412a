"""Contract 8: the same command continues, bit for bit, wherever it was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import flags, treadle
from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.checkpoint.reader import Checkpoint

HARD = {"dropout": 0.1, "gradient_accumulation_steps": 3, "max_steps": 20, "save_steps": 4, "logging_steps": 3,
        "style": "gpt2", "eval_steps": 10, "batch_size": 2}  # fmt: skip


def run_line(text: Path, folder: Path, **keys: object) -> list[str]:
    return [
        sys.executable,
        "-m",
        "treadle",
        "train",
        str(text),
        "--output_dir",
        str(folder),
        *flags(**{**HARD, **keys}),
    ]


def start(line: list[str], **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(line: list[str]) -> str:
    process = start(line)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def rows_of(folder: Path) -> list[dict]:
    """Metrics without what depends on the clock."""
    clock = {"tokens_per_second", "memory_gb", "data_wait", "seconds"}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def same_end(one: Path, other: Path, step: int = 20) -> None:
    assert rows_of(one) == rows_of(other)
    a, b = (Checkpoint(f / "checkpoints" / checkpoint_name(step)) for f in (one, other))
    for member in ("model.safetensors", "optimizer.safetensors"):
        assert a.manifest["files"][member] == b.manifest["files"][member], member


@pytest.mark.parametrize(
    "keys",
    [
        {"packing": "best_fit", "num_workers": 2, "document_separator": ""},
        pytest.param({"packing": "concat", "num_workers": 0, "precision": "bf16"}, marks=pytest.mark.slow),
        pytest.param({"packing": "next_fit", "optim.name": "normuon", "gradient_checkpointing": "true", "document_separator": ""},
                     marks=pytest.mark.slow),
        pytest.param({"precision": "fp16", "max_steps": 20, "tokenizer.name": "bpe", "vocab_size": 300}, marks=pytest.mark.slow),
    ],
    ids=["packed-workers", "bf16", "normuon-checkpointing", "fp16-bpe"],
)
def test_killed_at_any_moment_it_continues_bit_for_bit(text_file: Path, tmp_path: Path, keys: dict) -> None:
    """kill -9 at arbitrary moments (once by the clock, then after given rows), then the same command to the end."""
    finish(run_line(text_file, tmp_path / "whole", **keys))
    line, dice = run_line(text_file, tmp_path / "killed", **keys), random.Random(str(keys))
    for attempt in range(3):
        process = start(line)
        rows, metrics = dice.randint(1, 5) + 2 * attempt, tmp_path / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count("\n") >= rows:
                time.sleep(dice.random() * 0.05)
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    out = finish(line)
    assert ("Loading checkpoint: " in out and "Resumed from step " in out) or "is finished" in out
    same_end(tmp_path / "whole", tmp_path / "killed")


def test_interrupted_softly_it_saves_and_continues(text_file: Path, tmp_path: Path) -> None:
    keys = {"max_steps": 2000, "save_steps": 10000, "eval_steps": 5000}
    process = start(run_line(text_file, tmp_path / "run", **keys))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "The same command continues" in out, out
    (step,) = steps_in(tmp_path / "run" / "checkpoints")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "stopped"
    out = finish(run_line(text_file, tmp_path / "run", **{**keys, "max_steps": step + 3}))
    assert f"Resumed from step {step}" in out


def test_sigint_exits_130_and_usr1_saves_and_goes_on(text_file: Path, tmp_path: Path) -> None:
    process = start(run_line(text_file, tmp_path / "run", max_steps=3000, save_steps=10000, eval_steps=5000))
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    while not steps_in(tmp_path / "run" / "checkpoints"):
        time.sleep(0.01)
        assert process.poll() is None
    saved = steps_in(tmp_path / "run" / "checkpoints")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert max(steps_in(tmp_path / "run" / "checkpoints")) >= saved[0]


def test_a_finished_run_says_so(text_file: Path, tmp_path: Path) -> None:
    line = [text_file, "--output_dir", tmp_path / "run", *flags(max_steps=3)]
    assert treadle("train", *line).returncode == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = treadle("train", *line)
    assert again.returncode == 0 and "is finished" in again.stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    more = treadle("train", *line[:-2], *flags(max_steps=5))
    assert more.returncode == 0 and "Resumed from step 3" in more.stdout
    assert [r["step"] for r in rows_of(tmp_path / "run") if "learning_rate" in r] == [1, 2, 3, 4, 5]


def test_a_second_process_is_refused_with_73(text_file: Path, tmp_path: Path) -> None:
    process = start(run_line(text_file, tmp_path / "run", max_steps=5000))
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    second = treadle("train", text_file, "--output_dir", tmp_path / "run", *flags(max_steps=5000))
    assert second.returncode == 73 and f"process {process.pid}" in second.stderr
    process.kill()
    process.wait()
    assert treadle(
        "train", text_file, "--output_dir", tmp_path / "run", *flags(**{**HARD, "max_steps": 1})
    ).returncode in (0, 2)
