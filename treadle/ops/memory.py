"""The allocator's settings, made before the first tensor.

glibc returns large freed blocks to the system and takes them back at once: about 150,000 page faults a training step of
a 10M parameter model. Keeping freed memory saves 8-12% of the step's CPU time; its holes add up to a fifth to the peak.
Weights that are gathered and freed block by block (fsdp) leave so many holes that 163 MB of tensors took 600 MB (20M
parameters, two processes): there freed memory goes back at once.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from typing import Any

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
RETURNED_FROM = 64 << 10  # bytes of a block from which it goes back


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory and CUDA to grow segments; False where there is no glibc."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(
            libc.mallopt(M_MMAP_MAX, 0)
            and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
            and libc.mallopt(M_TOP_PAD, 64 << 20)
        )
    except (OSError, AttributeError):
        return False


def return_freed_memory() -> bool:
    """Tells glibc to give large freed blocks back at once; False where there is no glibc."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, RETURNED_FROM))
    except (OSError, AttributeError):
        return False


def resident_bytes() -> int:
    """Bytes of this process in memory now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()


def is_out_of_memory(problem: BaseException) -> bool:
    """An allocation that failed, on the host or a device."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    text = str(problem).lower()
    return isinstance(problem, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def peak_memory_gb(device: Any) -> float:
    """The most that this process has held so far, on its torch device."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_resident_bytes() / 1e9


def peak_resident_bytes() -> int:
    """The most bytes this process has had in memory. (Linux's ru_maxrss counts what the process had that started this one.)"""
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_bytes() -> int:
    """Bytes of memory of this machine, or the container's or the process's limit where a lower one is set."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        total = min(total, limit)
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as stream:
            total = min(total, int(stream.read()))
    except (OSError, ValueError):
        pass
    return total
