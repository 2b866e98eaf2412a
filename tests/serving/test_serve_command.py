"""`treadle serve` as a process: it finishes what runs when it is told to end, asks for its token, and is this machine's alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import flags, treadle


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    home = tmp_path_factory.mktemp("runs")
    out = treadle("train", text_file, *flags(max_steps=2, output_dir=home / "tiny"), cwd=home)
    assert out.returncode == 0, out.stderr
    return home / "tiny"


@contextlib.contextmanager
def serving(run: Path, *more: str, **environ: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the process, its address) once it answers."""
    line = [sys.executable, "-m", "treadle", "serve", str(run), "--port", "0", "--device", "cpu", *more]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environ})
    try:
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found, said + process.stderr.read()
        yield process, found[0]
    finally:
        process.kill()
        process.wait(10)


def test_sigterm_finishes_what_runs_and_the_token_is_asked_for(run: Path) -> None:
    secret = {"authorization": "Bearer a-secret-of-length"}
    with serving(run, "--max-new-tokens", "1500", TREADLE_TOKEN="a-secret-of-length") as (process, address):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers=secret).json()["data"][0]["id"] == "tiny"
        body: dict[str, Any] = {"prompt": "The", "max_tokens": 1500, "logit_bias": {"255": -100}}
        whole: list[httpx.Response] = []
        beside = threading.Thread(target=lambda: whole.append(httpx.post(f"{address}/v1/completions", json=body, headers=secret, timeout=60)))
        with httpx.stream("POST", f"{address}/v1/completions", headers=secret, timeout=60,
                          json={**body, "stream": True, "stream_options": {"include_usage": True}}) as answer:  # fmt: skip
            lines = answer.iter_lines()
            next(lines)
            beside.start()
            while 'running 2' not in httpx.get(f"{address}/metrics", headers=secret).text:
                pass
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["usage"]["completion_tokens"] == 1500
        beside.join(60)
        assert whole[0].json()["usage"]["completion_tokens"] == 1500
        assert process.wait(20) == 143
        assert process.stderr is not None and process.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")


def test_what_cannot_be_served_is_said_before_a_model_is_loaded(run: Path, tmp_path: Path) -> None:
    for line, said in [
        (["--host", "0.0.0.0"], "TREADLE_TOKEN"), (["--chat_template", "chatlm", "--port", "0"], "chatml"),
    ]:  # fmt: skip
        out = treadle("serve", run, *line, cwd=tmp_path)
        assert out.returncode == 2 and said in out.stderr and "Traceback" not in out.stderr, out.stderr


def test_chat_talks_and_takes_commands(run: Path) -> None:
    def talk(said: str, *more: str) -> str:
        out = subprocess.run([sys.executable, "-m", "treadle", "chat", str(run), "--max-new-tokens", "8", "--device", "cpu", *more], input=said,
                             capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert out.returncode == 0 and out.stderr == "", out.stderr
        return out.stdout

    system = talk("/temp 0\n/system be brief\n/help\n/system\nhello\n/quit\nnever read\n", "--chat-template", "plain")
    assert "system: be brief" in system and "no system text" in system and "/reset" in system and "temperature 0" in system and "/topk" in system
    out = treadle("chat", run, "--system", "x")
    assert out.returncode == 2 and "--chat_template" in out.stderr


def test_ctrl_c_at_a_terminal_ends_the_answer_and_not_the_program(run: Path) -> None:
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "treadle", "chat", str(run), "--device", "cpu", "--max-new-tokens", "1000000"])

    def heard(until: bytes) -> bytes:
        got = b""
        while until not in got:
            assert select.select([terminal], [], [], 60)[0], got
            got += os.read(terminal, 4096)
        return got

    try:
        heard(b"\n> ")
        for _ in range(5):  # the model may end an answer by itself
            os.write(terminal, b"The house\n")
            got = heard(b"\r\n")
            while not got.endswith(b"> ") and len(got) < 60:
                got += os.read(terminal, 4096)
            if not got.endswith(b"> "):
                break
        os.write(terminal, b"\x03")
        heard(b"\r\n> ")
        os.write(terminal, b"/temp 0\n")
        assert b"temperature 0.0" in heard(b"\r\n> ")
        os.write(terminal, b"/quit\n")
        assert os.waitpid(pid, 0)[1] == 0
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(terminal)
