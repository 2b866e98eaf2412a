"""Running a function in several processes that talk over gloo: forked, so that a test costs less than a second."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

LONGEST_SECONDS = 90


def _work(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update({"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(size)})
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        Path(folder, f"result-{rank}").write_text(repr(function(*arguments)))
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


def run_in(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls function(*arguments) in `size` processes with an initialised process group; returns what each returned
    (plain literals). An error in one is shown with its rank."""
    import ast

    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.start_processes(
            _work, args=(size, folder, function, arguments), nprocs=size, start_method="fork", join=False
        )
        until = time.monotonic() + LONGEST_SECONDS
        try:
            while not context.join(1.0):
                assert time.monotonic() < until, f"{size} processes have hung for {LONGEST_SECONDS} s"
        except multiprocessing.ProcessExitedException:
            pass
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        errors = {rank: Path(folder, f"error-{rank}") for rank in range(size)}
        shown = [f"rank {rank}:\n{path.read_text()}" for rank, path in errors.items() if path.exists()]
        assert not shown, "\n".join(shown)
        return [ast.literal_eval(Path(folder, f"result-{rank}").read_text()) for rank in range(size)]
