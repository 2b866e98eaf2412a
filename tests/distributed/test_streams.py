"""A stream from the command line: two processes with two workers each, killed at any moment, and gone on with by one."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import make_text, treadle
from tests.training.test_resume import rows_of, same_end, start

from .test_command_line import children, line

KEYS = {"data__streaming": "true", "max_steps": 12, "save_steps": 2, "global_batch_size": 8, "batch_size": 2, "num_workers": 2,
        "packing": "best_fit", "tokenizer__name": "byte", "validation_fraction": 0.02, "seq_len": 64, "dropout": 0,
        "lr_scheduler_type": "constant", "warmup_steps": 0}  # fmt: skip


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Compressed JSON lines, one of them broken."""
    (tmp_path / "text").mkdir()
    for number in range(3):
        words = make_text(300, seed=number).split()
        lines = [json.dumps({"text": " ".join(words[i : i + 30])}) for i in range(0, len(words), 30)]
        if number == 1:
            lines.insert(len(lines) // 2, "{broken")
        (tmp_path / "text" / f"{number}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path / "text"


def killed_and_continued(folder: Path, tmp_path: Path, kills: int) -> None:
    whole = start(line(folder, tmp_path / "whole", **KEYS))
    out, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, out
    command, dice, hit = line(folder, tmp_path / "killed", **KEYS), random.Random(1), 0
    for attempt in range(kills):
        process = start(command)
        rows, metrics = min(10, 2 + attempt * 10 // kills), tmp_path / "killed" / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= rows:
                time.sleep(dice.random() * 0.5)
                break
            time.sleep(0.02)
        for pid in [*children(process), process.pid] if dice.random() < 0.5 else children(process)[:1]:
            os.kill(pid, signal.SIGKILL)
            hit += 1
        process.communicate(timeout=70)
    process = start(command)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and hit >= max(1, kills // 2), out
    same_end(tmp_path / "whole", tmp_path / "killed", 12)


def test_killed_on_two_processes_it_continues_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    killed_and_continued(folder, tmp_path, 1)
    rows = [row["loss"] for row in rows_of(tmp_path / "whole") if "split" not in row]
    alone = start(line(folder, tmp_path / "alone", **{**KEYS, "run__devices": 1, "max_steps": 6}))
    alone.communicate(timeout=120)
    more = start(line(folder, tmp_path / "alone", **KEYS))  # begun by one, gone on with by two
    out, _ = more.communicate(timeout=120)
    assert more.returncode == 0 and "Resumed from step 6" in out, out
    found = [row["loss"] for row in rows_of(tmp_path / "alone") if "split" not in row]
    assert found == pytest.approx(rows, rel=1e-5)


@pytest.mark.slow
def test_thirty_kills(folder: Path, tmp_path: Path) -> None:
    killed_and_continued(folder, tmp_path, 30)


def test_one_process_says_what_it_left_out_and_what_to_type(folder: Path, tmp_path: Path) -> None:
    keys = ["--data.streaming", "true", "--num_layers", 1, "--hidden_size", 32, "--num_heads", 2, "--seq_len", 64, "--batch_size", 16]
    keys += ["--tokenizer.name", "byte", "--logging_steps", 1, "--eval_rows", 2, "--output_dir", tmp_path / "r"]
    missing = treadle("train", folder, *keys)
    assert missing.returncode == 2 and "--max_steps N" in missing.stderr
    out = treadle("train", folder, *keys, "--max_steps", 120)
    assert out.returncode == 0 and "epoch 2 begins" in out.stdout + out.stderr, out.stderr
    assert "1.jsonl.gz" in out.stdout + out.stderr and "broken JSON" in out.stdout + out.stderr
    events = [json.loads(row) for row in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    assert any("broken JSON" in event.get("text", "") for event in events)
    (folder / "3.jsonl.gz").write_bytes(gzip.compress(b'{"text": "more"}\n'))
    other = treadle("train", folder, *keys, "--max_steps", 140)
    assert other.returncode == 2 and "3.jsonl.gz is new" in other.stderr, other.stderr
