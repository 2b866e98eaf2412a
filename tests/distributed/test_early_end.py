"""Two processes of which one ends early: exit codes as documented, no hang, a line instead of a stack from C++.

The pairs are forked from one process that has begun as `treadle` does under a launcher, so that a case costs no start.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# What no user shall see: stacks of C++, and what an aborted process says.
STACKS = ("frame #", "Exception raised from", "terminate called", "[c10d]", "Fatal Python error", ".cc:", ".cpp:")

PAIRS = r"""
import json, os, signal, sys, time, traceback
os.environ.update(RANK="0", WORLD_SIZE="2", TORCH_CPP_LOG_LEVEL=sys.argv[3])
from treadle import cli
import torch
from treadle import start
from treadle.distributed import heartbeat, world
from treadle.distributed.launch import free_port
from treadle.distributed.notes import FOLDER
from treadle.errors import ConfigError, Stopped
heartbeat.BEAT_SECONDS = 0.1
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests in the background has it ignored


def end(how, pids):
    if how == "error":
        raise RuntimeError("boom")
    if how == "config":
        raise ConfigError("no such key")
    if how == "exit":
        sys.exit(3)
    if how in ("late", "never"):  # the other one is closing already, and hears its own SIGTERM only now
        time.sleep(0.5)
        os.kill(pids[0], signal.SIGTERM)
        time.sleep(0.5 if how == "late" else 8)
        stop()
    os.kill(os.getpid(), getattr(signal, how))


def stop():
    ended = Stopped("stopped by SIGTERM")
    ended.exit_code = 143
    raise ended


def work(how, who, computes):
    def train(request):
        with start.opened_world(request) as world:
            if how == "never":
                world.heartbeat.silence = 6.0
            pids = [pid for pid in world.all_gather_object(os.getpid()) if pid != os.getpid()]
            for step in range(400):
                world.all_reduce_sum([1.0])
                if step == 5 and world.rank == who:
                    end(how, pids)
                if step == 5 and how in ("late", "never"):
                    stop()
                if step == 5 and computes:
                    time.sleep(30)  # as in a wait of NCCL: no connection tells it anything
                time.sleep(0.01)
    start.train = train
    sys.argv = ["treadle", "train"]
    cli.main()


def fork(case, folder, rank, port):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(f"{folder}/stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if case["board"] == "notes":
        os.environ[FOLDER] = folder
    heartbeat.FAILED_SECONDS = 1.0 if case.get("computes") else 20.0
    heartbeat.CLOSING_SECONDS = 2.0 if case["how"] == "never" else 15.0
    code = 1
    try:
        work(case["how"], case["who"], case.get("computes"))
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    os._exit(code)


folder, cases = sys.argv[1], json.loads(sys.argv[2])
found, running = [{} for _ in cases], {}
for n, case in enumerate(cases):
    os.mkdir(f"{folder}/{n}")
    port = free_port()
    running |= {fork(case, f"{folder}/{n}", rank, port): (n, rank) for rank in (0, 1)}
begun = time.monotonic()
while running and time.monotonic() - begun < 25:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            n, rank = running.pop(pid)
            found[n][rank] = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begun}
    time.sleep(0.01)
for pid in running:
    os.kill(pid, 9)
for n in range(len(cases)):
    for rank in found[n]:
        with open(f"{folder}/{n}/stderr-{rank}") as stream:
            found[n][rank]["stderr"] = stream.read()
print(json.dumps(found))
"""

# how one process ends: its exit code, and what the other says of it where its word can reach it
ENDS = {
    "error": (1, "boom"), "config": (2, "no such key"), "exit": (3, "exit code 3"), "SIGKILL": (-9, ""),
    "SIGTERM": (143, "stopped by SIGTERM"), "SIGINT": (130, "stopped by SIGINT"),
}  # fmt: skip
CASES: list[dict[str, Any]] = [
    *({"how": how, "who": n % 2, "board": "notes"} for n, how in enumerate(ENDS)),
    *({"how": how, "who": who, "board": "store"} for how in ("error", "SIGKILL", "SIGTERM") for who in (0, 1)),
    *({"how": "error", "who": who, "board": board, "computes": True} for who, board in ((0, "store"), (1, "notes"))),
    *({"how": how, "who": who, "board": board} for how, who, board in (
        ("late", 0, "store"), ("late", 1, "store"), ("late", 0, "notes"), ("never", 1, "store"))),
]  # fmt: skip


def pairs(folder: Path, cases: list[dict[str, Any]], log_level: str = "ERROR") -> list[dict[str, dict[str, Any]]]:
    """By case and rank: exit code, seconds, stderr. A process that hangs is missing."""
    line = [sys.executable, "-c", PAIRS, str(folder), json.dumps(cases), log_level]
    done = subprocess.run(line, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return pairs(tmp_path_factory.mktemp("pairs"), CASES)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(str(v) for v in CASES[n].values()))
def test_one_ends_early(ended: list[dict[str, dict[str, Any]]], number: int) -> None:
    case, found = CASES[number], ended[number]
    how, one, other = case["how"], str(case["who"]), str(1 - case["who"])
    assert len(found) == 2, f"process {({'0', '1'} - set(found)).pop()} hangs"
    if how in ("late", "never"):
        assert [found[rank]["code"] for rank in "01"] == [143, 143]
        assert found["0"]["stderr"] == found["1"]["stderr"] == ""
        waited = abs(found["0"]["seconds"] - found["1"]["seconds"])
        assert waited < 0.4 if how == "late" else waited > 1, "the one that is done waits for the other, and not for ever"
        return
    code, word = ENDS[how]
    assert found[one]["code"] == code and found[other]["code"] == 75, found
    assert f"rank {other}: error: " in found[other]["stderr"] and "the same command continues" in found[other]["stderr"]
    if word:
        assert f"process {one} ended: {word}" in found[other]["stderr"]
    for rank in (one, other):
        for text in STACKS:
            assert text not in found[rank]["stderr"], found[rank]["stderr"]


def test_without_the_setting_a_stack_would_be_seen(tmp_path: Path) -> None:
    """What the tests above look for does come from torch: where the store dies with its process."""
    found = pairs(tmp_path, [{"how": "SIGKILL", "who": 0, "board": "store"}], "WARNING")[0]
    assert "frame #" in found["1"]["stderr"]
