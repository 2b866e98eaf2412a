"""Small C files, compiled on first use into the cache. Nothing needs them: without a compiler the torch form runs."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from treadle.files import cache_root
from treadle.terminal import write

SOURCES = Path(__file__).parent / "csrc"
# No contraction: a product and a sum round twice, as torch's two operations do, so that both give the same bits. The next two
# only say that nobody reads the processor's exception flags; without them loops with a choice are not vectorised.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-shared", "-fPIC")
SECONDS = 60.0


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled csrc/NAME.c, or None where there is no compiler, it fails (said once), or TREADLE_NATIVE=0."""
    if os.environ.get("TREADLE_NATIVE", "1") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None
    source = SOURCES / f"{name}.c"
    text = source.read_bytes() + b"".join(header.read_bytes() for header in sorted(SOURCES.glob("*.h")))
    mark = hashlib.sha256(f"{FLAGS} {_processor()} {compiler}".encode() + text).hexdigest()[:16]
    target = cache_root(None) / "native" / f"{name}-{mark}.so"
    try:
        if not target.is_file():
            _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as problem:
        detail = getattr(problem, "stderr", None) or problem
        write(f"note: {source.name} could not be compiled; the slower form in torch runs instead "
              f"({str(detail).strip().splitlines()[0] if str(detail).strip() else problem})", sys.stderr)  # fmt: skip
        return None


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Through a file of its own, so that processes that start together do not disturb each other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        subprocess.run([compiler, *FLAGS, str(source), "-o", temporary], check=True, capture_output=True, text=True, timeout=SECONDS)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _processor() -> str:
    """What -march=native means here; a cache on a shared disk serves several kinds of machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
