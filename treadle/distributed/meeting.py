"""How the processes of one attempt find each other, and nobody else.

A meeting place can outlive an attempt: torchrun's agent keeps one store over restarts, and a restart after a change of
machines does not even count as one (TORCHELASTIC_RESTART_COUNT stays). A process that met the keys of a dead one would
wait for it for ever. So no key is trusted that was there before: every process says hello with a random word, the first
one invites exactly the words it has read, and the attempt is on only when every process has answered that it found its own
word in the invitation. The dead do not answer. What the attempt then writes stands under a name drawn for it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from treadle.distributed.environment import Launch
from treadle.distributed.notes import WORD, Notes, taken_folder
from treadle.errors import PeerLost

SHORTEST_WAIT, LONGEST_WAIT = 0.01, 0.3


def open_board(launch: Launch, timeout: timedelta) -> tuple[Any, Any]:
    """Where this process meets the others: a board for small texts, and the store in which groups are made."""
    folder = taken_folder()
    if folder is not None:
        return Notes(folder), dist.FileStore(str(folder / "store"), launch.size)
    store, _, _ = next(rendezvous("env://", launch.rank, launch.size, timeout=timeout))
    return store, store


def named(board: Any, name: str) -> Any:
    """The part of a store that belongs to one attempt; the notes of a launch are of one attempt already."""
    return board if isinstance(board, Notes) else dist.PrefixStore(f"treadle/{name}", board)


def in_first_process(board: Any) -> bool:
    """The board goes with process 0; else a folder, or torchrun's agent, holds it."""
    return not isinstance(board, Notes) and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def meet(board: Any, launch: Launch, timeout: timedelta) -> str:
    """Waits until all processes of this attempt are here; returns a name for the attempt that was never used before.
    PeerLost when somebody does not come within `timeout`, or the launcher has seen one end."""
    rank, others = launch.rank, range(1, launch.size)
    mine, until, pause = secrets.token_hex(8), time.monotonic() + timeout.total_seconds(), SHORTEST_WAIT
    board.set(f"hello/{rank}", mine)
    invited: list[str] | None = None
    name = answered = ""
    while True:
        if rank == 0:
            if name and board.check([f"here/{name}/{other}" for other in others]):
                board.set(f"go/{name}", "1")
                return name
            if board.check([f"hello/{other}" for other in others]):
                words = [board.get(f"hello/{other}").decode() for other in others]
                if words != invited:  # all are here; or one was dead, and its successor has come
                    name, invited = secrets.token_hex(8), words
                    board.set("invitation", json.dumps([name, *words]))
        elif board.check(["invitation"]):
            name, *words = json.loads(board.get("invitation"))
            if name != answered and mine in words:
                board.set(f"here/{name}/{rank}", "1")
                answered = name
            if name == answered and board.check([f"go/{name}"]):
                return name
        if board.check([WORD]):
            raise PeerLost(f"{board.get(WORD).decode()}, before all had met; the same command tries again")
        if time.monotonic() > until:
            raise PeerLost(f"process {rank} of {launch.size} has waited {timeout.total_seconds():.0f} s: {_missing(board, launch)}")
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_WAIT)


def _missing(board: Any, launch: Launch) -> str:
    absent = [str(other) for other in range(launch.size) if not board.check([f"hello/{other}"])]
    who = f"process {', '.join(absent)} did not come" if absent else "not all answered"
    return f"{who}; check that all were started and can reach each other"
