"""Which of how many processes this one is: told by torchrun, torch.distributed.launch, SLURM, or nobody."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from treadle.errors import ConfigError

SLURM_PORT_BASE, SLURM_PORTS, SLURM_STEP_STRIDE = 15000, 20000, 7919


@dataclass(frozen=True)
class Launch:
    """The place of this process among all, and among those on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "none"


def detect(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads RANK, WORLD_SIZE and LOCAL_RANK (torchrun and everything that imitates it), else the SLURM step's variables.

    A SLURM batch script runs with SLURM_* set but is one process: only `srun` sets SLURM_STEP_NUM_TASKS.
    ConfigError where they contradict each other.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        local = _number(environ, "LOCAL_RANK", rank)
        found = Launch(rank, size, local, _number(environ, "LOCAL_WORLD_SIZE", size), "torchrun")
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        size, nodes = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_STEP_NUM_NODES", 1)
        local_size = max(1, size // max(1, nodes))
        found = Launch(
            _number(environ, "SLURM_PROCID"), size, _number(environ, "SLURM_LOCALID", 0), local_size, "slurm"
        )
    elif _number(environ, "WORLD_SIZE", 1) > 1:
        raise ConfigError(f"WORLD_SIZE = {environ['WORLD_SIZE']} without RANK: which of the processes is this? Start with "
                          "torchrun, or unset WORLD_SIZE to train in one process")  # fmt: skip
    else:
        return Launch()
    if not (0 <= found.rank < found.size and found.local_rank >= 0):
        raise ConfigError(f"the launcher says process {found.rank} of {found.size}; unset RANK and WORLD_SIZE to train "
                          "in one process, or start with torchrun")  # fmt: skip
    return found


def quiet(environ: MutableMapping[str, str] = os.environ) -> None:
    """Before torch is loaded: what its C++ says with a stack when a connection breaks is not shown; treadle says it in a
    line. TORCH_CPP_LOG_LEVEL=WARNING brings it back."""
    environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(str(text))
    except ValueError:
        raise ConfigError(f"{name} = {text!r} is no number; unset it, or start with torchrun") from None


def complete(environ: MutableMapping[str, str], launch: Launch) -> None:
    """Sets what torch.distributed reads (MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE) where SLURM gave other names.
    ConfigError where one is missing."""
    if launch.launcher == "slurm":
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
        environ.setdefault("MASTER_ADDR", first_host(nodes))
        job = re.sub(r"\D", "", environ.get("SLURM_JOB_ID", "0")) or "0"
        step = re.sub(r"\D", "", environ.get("SLURM_STEP_ID", "0")) or "0"  # two steps of a job may run side by side
        environ.setdefault("MASTER_PORT", str(SLURM_PORT_BASE + (int(job) + SLURM_STEP_STRIDE * int(step)) % SLURM_PORTS))
    environ["RANK"], environ["WORLD_SIZE"] = str(launch.rank), str(launch.size)
    if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
        raise ConfigError("RANK and WORLD_SIZE are set, MASTER_ADDR and MASTER_PORT are not; start with torchrun, or unset "
                          "them to train in one process")  # fmt: skip


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: "gpu[07-09,12],cpu1" -> "gpu07". ConfigError for a list that cannot be read."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)", nodes.strip())
    if match is None:
        raise ConfigError(f"SLURM's list of machines {nodes!r} cannot be read; set MASTER_ADDR")
    prefix, numbers, suffix = match.groups()
    first = re.split(r"[,-]", numbers)[0] if numbers else ""
    return prefix + first + (suffix if numbers else "")
