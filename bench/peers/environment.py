"""An environment of their own for the peers: the packages they need beside ours, with our torch.

    python -m bench.peers.environment            # makes .venv-peers/: accelerate, litgpt, lightning, xllamacpp, about 150 MB

It sees the packages of the environment that made it, and installs without dependencies, so that no peer can change the torch
that is measured. The bench uses it where it is there.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".venv-peers"
PACKAGES = ["accelerate", "psutil", "litgpt", "lightning", "lightning-utilities", "pytorch-lightning", "torchmetrics", "jsonargparse",
            "docstring-parser", "typeshed-client", "importlib-resources"]  # fmt: skip
ALONE = ["xllamacpp"]  # a wheel for some platforms only


def python() -> str:
    """The interpreter that has the peers: that of .venv-peers, or our own."""
    made = FOLDER / "bin" / "python"
    return str(made) if made.exists() else sys.executable


@functools.cache
def version(package: str) -> str | None:
    """Of a package that peers need; None where it is not installed."""
    if python() == sys.executable and importlib.util.find_spec(package) is None:
        return None
    program = f"import importlib.metadata as m, importlib.util as u; print(m.version({package!r}) if u.find_spec({package!r}) else '')"
    done = subprocess.run([python(), "-c", program], capture_output=True, text=True)
    return done.stdout.strip() or None


def missing(package: str) -> str:
    """Why a peer is skipped."""
    return f"skipped ({package} is not installed: python -m bench.peers.environment)"


def main() -> None:
    venv.create(FOLDER, with_pip=True, symlinks=True)
    here = sysconfig.get_path("purelib")
    there = next((FOLDER / "lib").glob("python3*")) / "site-packages"
    (there / "ours.pth").write_text(here + "\n", encoding="utf-8")
    pip = [python(), "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, *PACKAGES], check=True)
    for package in ALONE:
        if subprocess.run([*pip, package]).returncode:
            print(f"{package}: no wheel for this machine; what needs it is skipped")
    for package in ("torch", "accelerate", "litgpt", "xllamacpp"):
        print(f"{package} {version(package)}")


if __name__ == "__main__":
    main()
