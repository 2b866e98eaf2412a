"""The machine and the versions that a figure belongs to, and whether the machine is quiet enough for wall time."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from bench.peers import environment
from treadle.ops.processor import made_by_amd

PACKAGES = ("accelerate", "transformers", "litgpt", "xllamacpp")


def processor() -> tuple[str, set[str]]:
    """Its name and its flags; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return name, set(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def kind() -> str:
    """`amx`, `avx512_bf16` (where that pays: AMD's) or `plain`: which of the goals hold here."""
    flags = processor()[1]
    return "amx" if "amx_bf16" in flags else "avx512_bf16" if "avx512_bf16" in flags and made_by_amd() else "plain"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loaded() -> bool:
    """More than half a core is busy with something else: then only CPU seconds on one thread compare. The whole bench asks once, before
    it is a load itself, and leaves the answer in BENCH_LOADED."""
    return os.environ.get("BENCH_LOADED", "") == "1" if "BENCH_LOADED" in os.environ else os.getloadavg()[0] > 0.5


def describe() -> dict[str, Any]:
    import torch

    name, flags = processor()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    found = {"processor": name, "kind": kind(), "features": [flag for flag in wanted if flag in flags], "cores": cores(),
             "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
             "capability": torch.backends.cpu.get_cpu_capability(), "load": [round(one, 2) for one in os.getloadavg()]}  # fmt: skip
    return {**found, **{package: environment.version(package) or "not installed" for package in PACKAGES}}
