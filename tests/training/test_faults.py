"""Whole trainings against a hostile world: kills, a lying clock, folders that cannot be written, data that vanishes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import flags, make_text, treadle
from tests.training.test_resume import finish, run_line, same_end, start
from treadle.checkpoint.layout import checkpoint_name, steps_in
from treadle.files import cache_root
from treadle.models.pretrained import locate

STEPS = 24


def kills(text: Path, tmp_path: Path, count: int, seed: int) -> int:
    """Kills one training `count` times, each at a random moment, while it saves every 2 steps; returns how many hit."""
    keys = {"save_steps": 2, "max_steps": STEPS, "eval_steps": 8, "gradient_accumulation_steps": 2}
    finish(run_line(text, tmp_path / "whole", **keys))
    line, dice, hit = run_line(text, tmp_path / "killed", **keys), random.Random(seed), 0
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for attempt in range(count):
        rows = STEPS * attempt // count // 3  # rows are logged every 3 steps
        process = start(line)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if rows == 0 or (metrics.exists() and metrics.read_text().count("\n") >= rows):
                break
            time.sleep(0.002)
        time.sleep(dice.random() * (2.5 if rows == 0 else 0.08))
        process.send_signal(signal.SIGKILL)
        process.wait()
        hit += process.returncode == -signal.SIGKILL
        if steps_in(tmp_path / "killed" / "checkpoints"):
            locate(str(tmp_path / "killed"), warn=pytest.fail)
    finish(line)
    same_end(tmp_path / "whole", tmp_path / "killed", STEPS)
    return hit


def test_kills_quick(text_file: Path, tmp_path: Path) -> None:
    assert kills(text_file, tmp_path, 4, seed=0) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_slow(text_file: Path, tmp_path: Path) -> None:
    total = sum(kills(text_file, tmp_path / str(n), 20, seed=n) for n in range(3))
    print(f"{total} kills hit a running training")
    assert total >= 40


@pytest.mark.parametrize("shift", [pytest.param(-10 * 365 * 86400, marks=pytest.mark.slow), 3600], ids=["ten years back", "an hour ahead"])
def test_a_lying_clock_changes_nothing(text_file: Path, tmp_path: Path, shift: int) -> None:
    """Every file's time jumps between two starts: the newest checkpoint is the one with the highest step."""
    folder = tmp_path / "run"
    line = [text_file, "--output_dir", folder, *flags(max_steps=4, save_steps=2, eval_steps=2)]
    assert treadle("train", *line).returncode == 0
    for number, path in enumerate(sorted(folder.rglob("*"), reverse=True)):
        os.utime(path, (time.time() + shift + number, time.time() + shift + number))
    out = treadle("train", text_file, "--output_dir", folder, *flags(max_steps=6, save_steps=2, eval_steps=2))
    assert out.returncode == 0 and "Resumed from step 4" in out.stdout


def test_a_folder_that_turns_read_only(text_file: Path, tmp_path: Path) -> None:
    """Saving fails in the middle of a run: 74 (or 2 for the logs), the earlier checkpoint is whole, the run continues."""
    folder = tmp_path / "run"
    line = [text_file, "--output_dir", folder, *flags(max_steps=4, save_steps=2, eval_steps=2)]
    assert treadle("train", *line).returncode == 0
    checkpoints = folder / "checkpoints"
    moved = tmp_path / "aside"
    checkpoints.rename(moved)
    checkpoints.write_text("a file where the folder was")
    out = treadle("train", text_file, "--output_dir", folder, *flags(max_steps=6, save_steps=2, eval_steps=2))
    assert out.returncode in (2, 74) and "Traceback" not in out.stderr, out.stderr
    checkpoints.unlink()
    moved.rename(checkpoints)
    for name in ("metrics.jsonl", "training_log.csv"):
        assert (folder / name).exists()
    again = treadle("train", text_file, "--output_dir", folder, *flags(max_steps=6, save_steps=2, eval_steps=2))
    assert again.returncode == 0 and steps_in(checkpoints)[0] == 6


def test_a_deleted_shard_is_named_or_made_again(tmp_path: Path) -> None:
    """Prepared data that loses a shard: the error names the file; with the text still there, --fresh makes it again."""
    text = tmp_path / "t.txt"
    text.write_text(make_text(300, seed=77))
    prepared = tmp_path / "prepared"
    assert treadle("data", "prepare", text, "--output", prepared, "--tokenizer", "byte").returncode == 0
    keys = flags(max_steps=3)
    assert treadle("train", "--data.path", prepared, "--output_dir", tmp_path / "run", *keys).returncode == 0
    shard = next((prepared / "train").glob("*.bin"))
    shard.unlink()
    out = treadle("train", "--data.path", prepared, "--output_dir", tmp_path / "run", *flags(max_steps=5))
    assert out.returncode == 65 and shard.name in out.stderr and "--fresh" in out.stderr
    assert treadle("data", "prepare", text, "--output", prepared, "--tokenizer", "byte", "--fresh").returncode == 0
    out = treadle("train", "--data.path", prepared, "--output_dir", tmp_path / "run", *flags(max_steps=5))
    assert out.returncode == 0 and "Resumed from step 3" in out.stdout, out.stderr
    assert cache_root(None).exists()


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "..", ".hidden", "", "x" * 200, "a\nb", "con:x", "a b", "~"])
def test_run_names_stay_under_the_root(tmp_path: Path, text_file: Path, name: str) -> None:
    from treadle.errors import ConfigError
    from treadle.monitor.console import Console
    from treadle.start import Request, train

    before = set(tmp_path.parent.iterdir())
    with pytest.raises(ConfigError):
        train(Request(str(text_file), {"run.run_name": name}, flags_are_text=False), Console(quiet=True))
    assert set(tmp_path.parent.iterdir()) == before


def test_a_full_disk_for_real(text_file: Path, tmp_path: Path) -> None:
    """A 1 MB file system: the run says what is missing, keeps what it has, and goes on once there is room."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system here: {mounted.stderr.decode().strip()}")
    try:
        line = [text_file, "--output_dir", small / "run"]
        keys = {"save_steps": 1, "eval_steps": 100, "save_total_limit": 10, "report_to": "jsonl"}
        out = treadle("train", *line, *flags(max_steps=12, **keys))
        assert out.returncode == 74 and "MB are needed" in out.stderr, out.stderr
        kept = steps_in(small / "run" / "checkpoints")
        assert kept
        locate(str(small / "run"), warn=lambda text: pytest.fail(text))
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        again = treadle("train", *line, *flags(max_steps=12, **keys))
        assert again.returncode == 0 and f"Resumed from step {kept[0]}" in again.stdout
    finally:
        subprocess.run(["umount", "-l", str(small)])


def test_memory_that_really_runs_out(text_file: Path, tmp_path: Path) -> None:
    """With 3.5 GB of address space a step of 4096 x 256 cannot be allocated: 71, the kinds, and flags that work."""
    import resource

    line = ["train", text_file, "--output_dir", tmp_path / "run", "--tokenizer.name", "byte", "--max_steps", "1",
            "--seq_len", "256", "--hidden_size", "192", "--sample_tokens", "0", "--eval_rows", "1"]  # fmt: skip
    limit = 3_500_000 * 1024
    out = subprocess.run(
        [sys.executable, "-m", "treadle", *map(str, line), "--batch_size", "4096"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert out.returncode == 71 and "of 3.58 GB were in use (weights" in out.stderr, out.stderr
    assert "--per_device_train_batch_size 2048 --gradient_accumulation_steps 2" in out.stderr
    # Nothing was trained yet, so anything may change, the model too.
    again = treadle(*line, "--batch_size", 2, "--num_layers", 2)
    assert again.returncode == 0 and "1 steps of 2 rows" in again.stdout, again.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_resuming_at_step_10000_costs_no_more_than_a_start(text_file: Path, tmp_path: Path) -> None:
    """CPU seconds of one step at step 10,000 against one step of a fresh start, side by side."""
    folder = tmp_path / "long"
    keys = {"save_steps": 5000, "eval_steps": 10_000, "logging_steps": 100, "eval_rows": 2}
    treadle("train", text_file, "--output_dir", folder, *flags(max_steps=10_000, **keys), timeout=800)
    assert steps_in(folder / "checkpoints")[0] == 10_000
    ratios = []
    for n in range(3):
        taken = []
        for kind in ("fresh", "resumed"):
            place = tmp_path / f"{kind}{n}"
            if kind == "resumed":
                shutil.copytree(folder, place)
            end = 10_001 if kind == "resumed" else 1
            line = [sys.executable, "-m", "treadle", "train", str(text_file), "--output_dir", str(place),
                    *flags(max_steps=end, **keys)]  # fmt: skip
            before = os.times()
            subprocess.run(line, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            after = os.times()
            taken.append(after.children_user + after.children_system - before.children_user - before.children_system)
        ratios.append(taken[1] / taken[0])
    print(f"resumed / fresh CPU seconds: {sorted(ratios)}")
    assert sorted(ratios)[1] < 1.2
    assert json.loads((folder / "summary.json").read_text())["step"] == 10_000
    assert checkpoint_name(10_000) in os.listdir(folder / "checkpoints")
