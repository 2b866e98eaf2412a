"""The texts that quality is measured on, as files: a name that is a recipe too would bring the recipe's keys."""

from __future__ import annotations

import sysconfig
from pathlib import Path

LONG = 4_025_000  # characters of Python's source, as the novels have


def file_of(name: str, folder: Path) -> Path:
    """austen: the bundled novels; python: about as much source of Python's standard library, whole files in the order of their names.
    Either is written into `folder` once. Anything else is a path."""
    if name not in ("austen", "python"):
        return Path(name)
    path = folder / f"{name}.txt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(novels() if name == "austen" else _python(), encoding="utf-8")
    return path


def novels() -> str:
    """The bundled text."""
    from treadle.data.sources import open_source

    source = open_source("austen")
    return "".join(str(document) for piece in source.pieces() for document in source.read(piece))


def _python() -> str:
    library, taken, size = Path(sysconfig.get_path("stdlib")), [], 0
    for source in sorted(library.rglob("*.py")):
        if size < LONG and not {"site-packages", "test", "lib2to3", "idlelib"} & set(source.relative_to(library).parts):
            taken.append(source.read_text(encoding="utf-8", errors="replace"))
            size += len(taken[-1])
    return "\n\n".join(taken)
