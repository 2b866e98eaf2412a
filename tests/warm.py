"""The command line for tests, without its four seconds of imports: a process that has imported everything forks one child
for each command. The child runs `python -m treadle` as any other would: own arguments, folder, environment, files and exit.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = r"""
import json, os, runpy, signal, sys
import torch, torch.distributed, torch.utils.checkpoint, torch.utils.tensorboard, rich.live, typer
import treadle.cli, treadle.start, treadle.training.trainer, treadle.evaluation.report, treadle.reporting.compare, treadle.text.trained
asked, told = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w")
while line := asked.readline():
    wanted = json.loads(line)
    pid = os.fork()
    if pid == 0:
        break
    print(json.dumps(pid), file=told, flush=True)
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])), file=told, flush=True)
else:
    sys.exit()
asked.close(), told.close()
os.setpgid(0, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.chdir(wanted["cwd"])
os.environ.clear()
os.environ.update(wanted["environ"])
for number, path in ((1, wanted["stdout"]), (2, wanted["stderr"])):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
sys.argv = ["treadle", *wanted["line"]]
runpy.run_module("treadle", run_name="__main__", alter_sys=True)
"""
BEFORE_IMPORT = ("PYTHON", "OMP_", "MKL_", "TORCH_", "LD_", "CUDA_")  # environment that is read while things are imported


@functools.cache
def _server(environ: tuple[tuple[str, str], ...]) -> tuple[int, int]:
    """(where to ask, where it answers) of a process that was started with these variables of BEFORE_IMPORT."""
    here, there = os.pipe(), os.pipe()
    others = {name: value for name, value in os.environ.items() if not name.startswith(BEFORE_IMPORT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(here[0]), str(there[1])], pass_fds=(here[0], there[1]), stdin=subprocess.DEVNULL,
        env={**others, **dict(environ)},
    )  # fmt: skip
    os.close(here[0]), os.close(there[1])
    atexit.register(process.kill)
    return here[1], there[0]


def _answer(source: int, timeout: float | None) -> int | None:
    """The number in its next line; None when it takes longer."""
    text = b""
    while not text.endswith(b"\n"):
        if not select.select([source], [], [], timeout)[0]:
            return None
        got = os.read(source, 1)
        assert got, "the process that commands are forked from is gone"
        text += got
    return int(json.loads(text))


def run(line: list[str], cwd: Path | None, timeout: float, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As subprocess.run([python, -m, treadle, *line], capture_output=True, text=True, stdin=DEVNULL, ...)."""
    ask, answers = _server(tuple(sorted((k, v) for k, v in environ.items() if k.startswith(BEFORE_IMPORT))))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("stdout", "stderr")}
        wanted = {"line": line, "cwd": str(cwd or Path.cwd()), "environ": environ, **{n: str(p) for n, p in files.items()}}
        os.write(ask, (json.dumps(wanted) + "\n").encode())
        pid = _answer(answers, None)
        assert pid is not None
        code = _answer(answers, timeout)
        if code is None:
            os.killpg(pid, signal.SIGKILL)
            _answer(answers, None)
        said = {name: path.read_text() if path.exists() else "" for name, path in files.items()}
    if code is None:
        raise subprocess.TimeoutExpired(line, timeout, said["stdout"], said["stderr"])
    return subprocess.CompletedProcess([sys.executable, "-m", "treadle", *line], code, said["stdout"], said["stderr"])
