"""Two processes of which one ends early: exit codes as documented, no hang, a line instead of a stack from C++.

The pairs are forked from one process that has started as `treadle` does under a launcher, so that a case costs a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import flags

# What no user shall see: stacks of C++, and what an aborted process says.
STACKS = ("frame #", "Exception raised from", "terminate called", "[c10d]", "Fatal Python error", "/csrc/")

PAIRS = r"""
import json, os, signal, sys, time
os.environ.update(RANK="0", WORLD_SIZE="2", TREADLE_BEATS="")
from treadle import cli
cli._rank() and __import__("treadle.distributed.environment").distributed.environment.quiet()
import torch
import treadle.start as start, treadle.distributed.world, treadle.distributed.heartbeat as heartbeat
from treadle.distributed.notes import FOLDER
from treadle.errors import ConfigError, Stopped
from treadle.distributed.launch import free_port
heartbeat.BEAT_SECONDS = 0.1


def stopped():
    stop = Stopped("stopped by SIGTERM")
    stop.exit_code = 143
    raise stop


def work(case):
    how, who = case["how"], case["who"]
    def train(request):
        with start.opened_world(request) as world:
            if case.get("closing"):
                heartbeat.CLOSING_SECONDS = case["closing"]
            for step in range(400):
                world.all_reduce_sum([1.0])
                mine = world.rank == who
                if step < 5:
                    continue
                if how == "late" or how == "never":
                    if mine:
                        time.sleep(1.0 if how == "late" else 30)
                    stopped()
                if mine and how == "hang":  # ends badly, and the other does not wait in a connection: it computes
                    raise ConfigError("no such key")
                if how == "hang":
                    time.sleep(30)
                if mine:
                    if how == "error": raise RuntimeError("boom")
                    if how == "config": raise ConfigError("no such key")
                    if how == "exit": sys.exit(3)
                    os.kill(os.getpid(), getattr(signal, how))
                time.sleep(0.02)
    start.train = train
    sys.argv = ["treadle", "train"]
    cli.main()


def pair(number, case):
    folder = f"{sys.argv[1]}/{number}"
    os.mkdir(folder)
    port, pids = free_port(), []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(f"{folder}/err{rank}", os.O_CREAT | os.O_WRONLY), 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            if case["meeting"] == "folder":
                os.environ[FOLDER] = folder
            try:
                work(case)
            except SystemExit as end:
                os._exit(end.code)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    return pids


cases = json.loads(sys.argv[2])
running = {pid: (n, rank) for n, case in enumerate(cases) for rank, pid in enumerate(pair(n, case))}
begun, found = time.monotonic(), [{} for _ in cases]
again = [(pid, cases[n]) for pid, (n, rank) in running.items() if cases[n]["how"] == "late" and rank != cases[n]["who"]]
while running and time.monotonic() - begun < 50:
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            n, rank = running.pop(pid)
            found[n][rank] = [os.waitstatus_to_exitcode(status), time.monotonic()]
    for pid, case in list(again):  # the early one hears its own SIGTERM only when it is closing already
        path = f"{sys.argv[1]}/{cases.index(case)}/err0"
        if os.path.exists(path) and time.monotonic() - begun > 60:
            again.remove((pid, case))
    time.sleep(0.01)
for pid in running:
    os.kill(pid, signal.SIGKILL)
print(json.dumps(found))
"""
