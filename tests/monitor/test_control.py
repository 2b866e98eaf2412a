"""Steering a running training, for real: typed into it, sent from another process, by signals, in the background."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import flags, treadle
from treadle.checkpoint.layout import steps_in
from treadle.errors import ConfigError, InputError
from treadle.monitor.control import parse_command, send


def start(
    text: Path, folder: Path, *more: str, stdin: object = subprocess.DEVNULL, **keys: object
) -> subprocess.Popen[str]:
    settings = {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": 50_000, "report_to": "jsonl", **keys}
    line = [sys.executable, "-m", "treadle", "train", str(text), "--output_dir", str(folder), *flags(**settings), *more]
    return subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=stdin, stdout=subprocess.PIPE,  # type: ignore[call-overload]
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_another_terminal_steers_it(text_file: Path, tmp_path: Path) -> None:
    """status, save, eval, set, help, nonsense and stop through `treadle ctl`; 75; the change is logged and kept."""
    folder = tmp_path / "run"
    process = start(text_file, folder)
    wait_for_rows(folder, 3, process)
    answer = send(folder, "status", 20)
    for part in ("step ", "of 100000", "loss ", "learning rate ", "tok/s", "ETA ", "no checkpoint yet"):
        assert part in answer
    assert "saving after step" in send(folder, "save", 20)
    while not steps_in(folder / "checkpoints"):
        time.sleep(0.01)
    assert "last checkpoint step-" in send(folder, "status", 20)
    assert "evaluating" in send(folder, "eval", 20)
    assert "optim.learning_rate = 0.0001" in send(folder, "set optim.learning_rate=1e-4", 20)
    assert "greater than 0" in send(folder, "set learning_rate=-1", 20)
    assert "cannot be set" in send(folder, "set seed=3", 20) and "stop  " in send(folder, "help", 20)
    out = treadle("ctl", folder, "stop")
    assert out.returncode == 0 and "stopping after step" in out.stdout
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "Stopped by stop after step" in text and "same command continues" in text
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert any(e["event"] == "command" and e["line"] == "set optim.learning_rate=1e-4" for e in events)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(r.get("split") for r in rows) and rows[-1]["learning_rate"] < 2e-4
    # The change holds when the same command continues.
    again = treadle(
        "train", text_file, "--output_dir", folder, *flags(max_steps=steps_in(folder / "checkpoints")[0] + 3)
    )
    assert again.returncode == 0
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])["learning_rate"] <= 1e-4
    with pytest.raises(InputError, match="nobody is training"):
        send(folder, "status")


def test_words_typed_into_it(text_file: Path, tmp_path: Path) -> None:
    """A pipe as standard input: commands are answered; the end of the input is not `stop`."""
    folder = tmp_path / "run"
    process = start(text_file, folder, stdin=subprocess.PIPE, max_steps=400)
    wait_for_rows(folder, 2, process)
    assert process.stdin is not None
    process.stdin.write("status\nhelp\nnonsense\n")
    process.stdin.flush()
    process.stdin.close()
    process.stdin = None  # type: ignore[assignment]
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Finished at step 400" in text
    assert "learning rate" in text and "'nonsense' is no command" in text
    process = start(text_file, tmp_path / "two", stdin=subprocess.PIPE)
    wait_for_rows(tmp_path / "two", 2, process)
    text, _ = process.communicate("stop\n", timeout=60)
    assert process.returncode == 75 and "Stopped by stop" in text


def test_in_the_background_of_a_terminal(text_file: Path, tmp_path: Path) -> None:
    """A background job of a terminal's shell is not stopped for reading it, and finishes."""
    import pty

    main, side = pty.openpty()
    program = (
        "import os, subprocess, sys\n"
        "os.setsid(); import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "p = subprocess.Popen(sys.argv[1:], process_group=0)\n"  # a group of its own, not the terminal's foreground
        "sys.exit(p.wait())\n"
    )
    line = [
        sys.executable,
        "-m",
        "treadle",
        "train",
        str(text_file),
        "--output_dir",
        str(tmp_path / "r"),
        *flags(max_steps=60),
    ]
    process = subprocess.Popen([sys.executable, "-c", program, *line], stdin=side, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(side)
    assert process.wait(timeout=60) == 0
    os.close(main)
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("moment", ["start-up", "evaluation", "save"])
def test_sigterm_at_awkward_moments(text_file: Path, tmp_path: Path, moment: str) -> None:
    """Wherever it hits, the run continues afterwards with the same command and nothing is lost."""
    folder = tmp_path / "run"
    keys = {"start-up": {}, "evaluation": {"eval_steps": 3, "eval_rows": 60}, "save": {"save_steps": 1}}[moment]
    process = start(text_file, folder, **{"max_steps": 400, **keys})
    if moment == "start-up":
        time.sleep(0.6)
    else:
        wait_for_rows(folder, 4, process)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode in (143, -signal.SIGTERM)  # killed before the training began, or saved and exited
    settings = {"report_to": "jsonl", "save_steps": 100_000, "eval_steps": 50_000, **keys, "max_steps": 12}
    reached = max(steps_in(folder / "checkpoints"), default=0)
    assert (process.returncode == 143) == (reached > 0)
    again = treadle(
        "train", text_file, "--output_dir", folder, *flags(**{**settings, "max_steps": max(12, reached + 2)})
    )
    assert again.returncode == 0, again.stderr
    steps = [json.loads(r) for r in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [r["step"] for r in steps if "learning_rate" in r]
    assert logged == list(range(1, max(12, reached + 2) + 1))  # no step twice, none missing


def test_words() -> None:
    assert parse_command(" SET a=b ") == ("set", "a=b") and parse_command("/status") == ("status", "")
    with pytest.raises(ConfigError, match="no command"):
        parse_command("halt")


def test_a_stale_lock_file_is_nobody(tmp_path: Path) -> None:
    import socket

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "LOCK").write_text(f"process {gone.pid} on {socket.gethostname()}")
    with pytest.raises(InputError, match="nobody"):
        send(tmp_path, "status")
    with pytest.raises(InputError, match="does not exist"):
        send(tmp_path / "nowhere", "status")
