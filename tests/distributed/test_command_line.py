"""Several processes from the command line: started, stopped, killed, continued."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import flags, treadle
from tests.training.test_resume import rows_of, same_end, start
from treadle.distributed.launch import cores

LONG = {"max_steps": 20, "save_steps": 4, "eval_steps": 10, "batch_size": 2, "dropout": 0.1, "style": "gpt2",
        "logging_steps": 1}  # fmt: skip


def line(text: Path, folder: Path, **keys: object) -> list[str]:
    wanted = flags(**{**LONG, "run__devices": 2, **keys})
    return [sys.executable, "-m", "treadle", "train", str(text), "--output_dir", str(folder), *wanted]


def wait_for_rows(process: subprocess.Popen, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)


def children(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int(re.search(r"\) \S (\d+)", (entry / "stat").read_text())[1])  # type: ignore[index]
            if parent == process.pid:
                environ = (entry / "environ").read_bytes().split(b"\0")
                found[next(int(e[5:]) for e in environ if e.startswith(b"RANK="))] = int(entry.name)
        except (OSError, ValueError, TypeError, StopIteration):
            continue
    return [found[rank] for rank in sorted(found)]


def test_a_killed_process_stops_the_others_and_the_same_command_continues(text_file: Path, tmp_path: Path) -> None:
    whole = start(line(text_file, tmp_path / "whole", parallel__mode="ddp"))
    out, _ = whole.communicate(timeout=90)
    assert whole.returncode == 0 and out.count("Finished at step 20") == 1, out  # rank 0 alone prints
    command = line(text_file, tmp_path / "killed", parallel__mode="ddp")
    for rank, rows in ((1, 6), (0, 11)):
        process = start(command)
        wait_for_rows(process, tmp_path / "killed", rows)
        os.kill(children(process)[rank], signal.SIGKILL)
        begun = time.monotonic()
        out, _ = process.communicate(timeout=70)
        assert process.returncode == 137 and time.monotonic() - begun < 60
        assert f"rank {1 - rank}: error: process {rank} was ended by SIGKILL. " in out, out  # the launcher saw it
        assert "the same command continues" in out and "frame #" not in out and "Exception raised" not in out, out
    process = start(command)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 0 and "Resumed from step" in out, out
    same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_stop_reaches_all_and_comes_back_as_one_code(text_file: Path, tmp_path: Path) -> None:
    process = start(line(text_file, tmp_path / "r", max_steps=100000, save_steps=100000, parallel__mode="fsdp"))
    wait_for_rows(process, tmp_path / "r", 3)
    answer = treadle("ctl", tmp_path / "r", "status")
    assert answer.returncode == 0 and "of 100000" in answer.stdout, answer.stderr
    assert treadle("ctl", tmp_path / "r", "set", "optim.learning_rate=1e-5").returncode == 0
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and out.count("Stopped by SIGTERM") == 1, out
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["status"] == "stopped" and summary["exit_code"] == 143 and summary["parallel"] == "fsdp"
    assert not children(process)
    last = rows_of(tmp_path / "r")[-1]
    again = treadle("train", text_file, "--output_dir", tmp_path / "r", *flags(**{**LONG, "max_steps": last["step"] + 2}))
    assert again.returncode == 0 and f"Resumed from step {last['step']}" in again.stdout, again.stderr  # by one process
    assert last["learning_rate"] <= 1e-5


def test_far_too_many_processes_are_refused_before_one_starts(text_file: Path, tmp_path: Path) -> None:
    out = treadle("train", text_file, "--output_dir", tmp_path / "r", *flags(run__devices=9999))
    assert out.returncode == 2 and f"type --devices {cores()}" in out.stderr, out.stderr
    assert out.stderr.count("error:") == 1 and not (tmp_path / "r").exists()


def test_under_torchrun(text_file: Path, tmp_path: Path) -> None:
    arguments = ["train", str(text_file), "--local-rank=0", "--output_dir", str(tmp_path / "r"), *flags(**LONG)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "treadle"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes (ddp)") == 1 and len(rows_of(tmp_path / "r")) == 22
    broken = subprocess.run(
        [*command, *arguments, "--shard_size", "3", "--parallel", "fsdp", "--fresh"],
        env=environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert broken.returncode != 0 and ": error: parallel.shard_size = 3" in broken.stderr  # of the rank that was not ended first
