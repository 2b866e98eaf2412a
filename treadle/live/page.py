"""The page of a live run: its own markup and script around the pieces that it shares with reports."""

from __future__ import annotations

import functools
from importlib import resources

from treadle.serving.page import guards


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. A browser runs its own script and style alone, and asks nobody but this server."""
    text = resources.files("treadle.live").joinpath("live.html").read_text("utf-8")
    return text.encode(), guards(text)
