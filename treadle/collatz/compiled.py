"""Loading the loops that numba compiles (extra `collatz`), and doing without: importing this file loads no numba."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

from treadle.errors import ConfigError, MissingExtra
from treadle.files import cache_root


@functools.cache
def load(name: str) -> ModuleType | None:
    """treadle.collatz.NAME, whose functions are compiled on first use and kept in the cache; None where numba is missing."""
    if importlib.util.find_spec("numba") is None:
        return None
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_root(None) / "numba"))
    return importlib.import_module(f"treadle.collatz.{name}")


def resolved(path: str, paths: tuple[str, ...], what: str) -> str:
    """The path of `paths`, fastest first, that `path` stands for here: "auto" is the first one whose package is installed."""
    if path == "auto":
        return next(name for name in paths if name != "numba" or importlib.util.find_spec("numba") is not None)
    if path not in paths:
        raise ConfigError(f"no path {path!r} for {what}; there are auto, {', '.join(paths)}")
    if path == "numba" and importlib.util.find_spec("numba") is None:
        raise MissingExtra(f"the compiled path of {what}", "collatz")
    return path
